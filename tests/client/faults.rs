//! Lost, late, cut and doubled messages, failing tasks, locks, and an administrator at work.

use std::fs;
use std::time::Duration;

use serde_json::json;
use shim_proxmox::pve::identity::{Id128, Identity};
use shim_proxmox::pve::{Error, Failure, Outcome};
use tokio::time::{Instant, sleep};

use crate::world::{World, soon, vmid};

const START: &str = "/status/start";
const STOP: &str = "/status/stop";

#[tokio::test]
async fn a_ct_is_started_stopped_and_destroyed() {
    let w = World::new().await;
    w.client.check().await.unwrap();
    w.started().await;
    assert!(w.running().await);
    assert!(w.client.list().await.unwrap().iter().any(|ct| ct.vmid == w.vmid() && ct.running));
    assert_eq!(w.client.stop_ours(&w.ours, soon()).await.unwrap(), Outcome::Done);
    assert_eq!(w.client.stop_ours(&w.ours, soon()).await.unwrap(), Outcome::AlreadySo);
    assert_eq!(w.client.destroy_ours(&w.ours, soon()).await.unwrap(), Outcome::Done);
    assert_eq!(w.client.destroy_ours(&w.ours, soon()).await.unwrap(), Outcome::AlreadySo);
    assert!(!w.conf().exists());
}

#[tokio::test]
async fn a_start_that_was_lost_on_the_way_stays_unclear_and_is_not_sent_again() {
    for effect in [
        json!("lose-request"),
        json!({"status": {"code": 596, "reason": "Connection timed out"}}),
        json!({"status": {"code": 599, "reason": "Too many redirections"}}),
    ] {
        let w = World::new().await;
        let sent = w.count("POST", START).await;
        w.fault("POST", START, effect.clone()).await;
        let error = w.client.start(w.vmid()).await.unwrap_err();
        assert!(error.is_unclear(), "{effect}: {error:?}");
        assert_eq!((sent().await, w.tasks("vzstart").await), (1, 0), "{effect}");
        assert!(!w.running().await);
    }
}

#[tokio::test]
async fn a_start_whose_answer_was_lost_is_found_by_its_task() {
    for effect in [
        json!("lose-answer"),
        json!({"truncate": {"bytes": 20}}),
        json!({"garble": {"bytes": 20}}),
        json!({"garble": {"bytes": 0}}),
        // Longer than a call may take.
        json!({"delay-answer": {"ms": 3000}}),
        json!({"delay-request": {"ms": 1500}}),
    ] {
        let w = World::new().await;
        let sent = w.count("POST", START).await;
        w.fault("POST", START, effect.clone()).await;
        let upid = w.client.start(w.vmid()).await.unwrap_or_else(|e| panic!("{effect}: {e:?}"));
        w.client.wait(&upid, soon()).await.unwrap();
        assert!(w.running().await, "{effect}");
        assert_eq!((sent().await, w.tasks("vzstart").await), (1, 1), "{effect}");
    }
}

#[tokio::test]
async fn a_start_that_is_carried_out_twice_starts_one_ct() {
    let w = World::new().await;
    w.fault("POST", START, json!("duplicate")).await;
    // The answer is that to the second: that it runs, or a task that finds so.
    let result = match w.client.start(w.vmid()).await {
        Ok(upid) => w.client.wait(&upid, soon()).await,
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        assert_eq!(error.failure(), Some(&Failure::AlreadyRunning), "{error:?}");
    }
    let begun = Instant::now();
    while !w.running().await {
        assert!(begun.elapsed() < Duration::from_secs(5));
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_start_task_that_fails_tells_the_step_s_text() {
    for (step, runs) in [("begin", false), ("locked", false), ("spawned", false), ("end", true)] {
        let w = World::new().await;
        let text = format!("it broke at {step}");
        w.control(json!({"fail-task": {"type": "vzstart", "step": step, "text": text}})).await;
        let upid = w.client.start(w.vmid()).await.unwrap();
        let error = w.client.wait(&upid, soon()).await.unwrap_err();
        let Error::TaskFailed { text: found, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*found, text);
        // The task's word is not the CT's state.
        if runs {
            assert!(w.running().await, "{step}");
        }
    }
}

#[tokio::test]
async fn a_held_lock_is_waited_for() {
    let w = World::new().await;
    w.started().await;
    w.control(json!({"hold-lock": {"vmid": w.vmid().get()}})).await;
    // Proxmox gives up after 10 s, here 0.2.
    let error = w.client.stop(w.vmid()).await;
    let error = w.client.wait(&error.unwrap(), soon()).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::LockTimeout), "{error:?}");
    let simulator = w.simulator.clone();
    let command = json!({"release-lock": {"vmid": w.vmid().get()}});
    let release = tokio::task::spawn_blocking(move || {
        std::thread::sleep(Duration::from_millis(500));
        simulator.try_control(&command)
    });
    assert_eq!(w.client.stop_ours(&w.ours, soon()).await.unwrap(), Outcome::Done);
    release.await.unwrap().unwrap();
    assert!(w.tasks("vzstop").await > 2);
}

#[tokio::test]
async fn an_administrator_s_lock_is_waited_for_until_the_deadline_and_then_named() {
    let w = World::new().await;
    let lock = w.administrator("PUT", "/config", json!({"lock": "backup"}));
    w.control(json!({ "call": lock })).await;
    let deadline = Instant::now() + Duration::from_millis(500);
    let error = w.client.destroy_ours(&w.ours, deadline).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::Locked { by: "backup".into() }), "{error:?}");
    assert!(w.conf().exists());
}

#[tokio::test]
async fn a_stop_or_destruction_whose_answer_is_lost_or_doubled_ends_well() {
    for effect in [
        json!("lose-answer"),
        json!("lose-request"),
        json!("duplicate"),
        json!({"garble": {"bytes": 5}}),
    ] {
        let w = World::new().await;
        w.started().await;
        w.fault("POST", STOP, effect.clone()).await;
        w.client.stop_ours(&w.ours, soon()).await.unwrap_or_else(|e| panic!("{effect}: {e:?}"));
        assert!(!w.running().await, "{effect}");
        w.fault("DELETE", "", effect.clone()).await;
        w.client.destroy_ours(&w.ours, soon()).await.unwrap_or_else(|e| panic!("{effect}: {e:?}"));
        assert!(!w.conf().exists(), "{effect}");
    }
}

#[tokio::test]
async fn what_an_administrator_has_done_first_is_found_so() {
    let w = World::new().await;
    let start = w.administrator("POST", START, json!({}));
    w.fault("POST", START, json!({ "call-before": start })).await;
    let error = w.client.start(w.vmid()).await.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::AlreadyRunning), "{error:?}");
    let stop = w.administrator("POST", STOP, json!({}));
    w.fault("POST", STOP, json!({ "call-before": stop })).await;
    assert_eq!(w.client.stop_ours(&w.ours, soon()).await.unwrap(), Outcome::AlreadySo);
    let destroy = w.administrator("DELETE", "", json!({}));
    w.fault("DELETE", "", json!({ "call-before": destroy })).await;
    assert_eq!(w.client.destroy_ours(&w.ours, soon()).await.unwrap(), Outcome::AlreadySo);
}

#[tokio::test]
async fn a_ct_that_an_administrator_starts_or_reboots_meanwhile_is_not_destroyed() {
    for (action, params) in [("start", json!({})), ("reboot", json!({"timeout": "1"}))] {
        let w = World::new().await;
        if action == "reboot" {
            w.started().await;
        }
        let call = w.administrator("POST", &format!("/status/{action}"), params);
        w.fault("DELETE", "", json!({ "call-before": call })).await;
        // It might just be about to end; but not for long.
        let error = w.client.destroy_ours(&w.ours, soon()).await.unwrap_err();
        assert_eq!(error.failure(), Some(&Failure::Running), "{action}: {error:?}");
        assert!(w.running().await && w.conf().exists(), "{action}");
        // A stop makes it possible.
        w.client.stop_ours(&w.ours, soon()).await.unwrap();
        w.client.destroy_ours(&w.ours, soon()).await.unwrap();
    }
}

#[tokio::test]
async fn an_edit_between_reading_and_writing_is_not_overwritten() {
    let w = World::new().await;
    let shown = w.client.config(w.vmid()).await.unwrap();
    let edit = w.administrator("PUT", "/config", json!({"tags": "theirs"}));
    w.fault("PUT", "/config", json!({ "call-before": edit })).await;
    let put = w.client.put_config(w.vmid(), &[("tags", "ours")], Some(&shown.digest)).await;
    let error = put.unwrap_err();
    assert_eq!(error.failure(), Some(&Failure::DigestMismatch), "{error:?}");
    assert_eq!(w.client.config(w.vmid()).await.unwrap().tags.as_deref(), Some("theirs"));
}

#[tokio::test]
async fn a_ct_that_has_become_somebody_else_s_is_left_alone() {
    // Its notes are edited, or it is destroyed and another one takes the VMID.
    let w = World::new().await;
    w.started().await;
    let edit = w.administrator("PUT", "/config", json!({"description": "my database"}));
    w.fault("GET", "/config", json!({ "call-before": edit })).await;
    let error = w.client.stop_ours(&w.ours, soon()).await.unwrap_err();
    assert!(matches!(error, Error::NotOurs { .. }), "{error:?}");
    assert!(w.running().await);
    w.write_ct(&Identity { nonce: Id128::random().unwrap(), ..w.ours.clone() });
    for error in [
        w.client.stop_ours(&w.ours, soon()).await.unwrap_err(),
        w.client.destroy_ours(&w.ours, soon()).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::NotOurs { .. }), "{error:?}");
    }
    assert!(w.running().await && w.conf().exists());
    assert_eq!((w.tasks("vzstop").await, w.tasks("vzdestroy").await), (0, 0));
}

#[tokio::test]
async fn a_clone_has_our_notes_and_is_still_not_ours() {
    let w = World::new().await;
    let clone = Identity { vmid: vmid(), ..w.ours.clone() };
    let path = w.simulator.confs().join(format!("{}.conf", clone.vmid));
    fs::copy(w.conf(), &path).unwrap();
    let error = w.client.destroy_ours(&clone, soon()).await.unwrap_err();
    assert!(matches!(error, Error::NotOurs { .. }), "{error:?}");
    assert!(path.exists());
}

#[tokio::test]
async fn a_revoked_token_is_told_once() {
    let w = World::new().await;
    w.client.check().await.unwrap();
    w.control(json!({"revoke-token": {"token": "root@pam!admin"}})).await;
    let sent = w.count("POST", START).await;
    let error = w.client.start(w.vmid()).await.unwrap_err();
    assert!(matches!(error, Error::Authentication { .. }), "{error:?}");
    assert!(error.to_string().contains("root@pam!admin"), "{error}");
    assert!(sent().await <= 1);
}

#[tokio::test]
async fn waiting_for_a_task_survives_lost_and_slow_answers() {
    let w = World::new().await;
    let path = "/nodes/pve1/tasks/*/status";
    for effect in [
        json!("lose-request"),
        json!("lose-answer"),
        json!({"delay-answer": {"ms": 1500}}),
        json!({"status": {"code": 596, "reason": "x"}}),
    ] {
        w.control(json!({"fault": {"path": path, "times": 4, "effect": effect}})).await;
    }
    let upid = w.client.start(w.vmid()).await.unwrap();
    w.client.wait(&upid, Instant::now() + Duration::from_secs(30)).await.unwrap();
    assert!(w.running().await);
}

#[tokio::test]
async fn a_get_survives_what_breaks_on_the_way() {
    let w = World::new().await;
    for effect in [
        json!("lose-request"),
        json!("lose-answer"),
        json!({"truncate": {"bytes": 7}}),
        json!({"garble": {"bytes": 7}}),
        json!({"status": {"code": 599, "reason": "x"}}),
        json!({"delay-answer": {"ms": 300}}),
        json!("duplicate"),
    ] {
        let fault = json!({"path": w.path("/config"), "times": 2, "effect": effect});
        w.control(json!({ "fault": fault })).await;
        w.client.config(w.vmid()).await.unwrap_or_else(|e| panic!("{effect}: {e:?}"));
        w.control(json!({"clear": {}})).await;
    }
}
