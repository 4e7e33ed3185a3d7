//! What goes wrong between the client and the server, as far as it needs no CT: those are tested
//! against the simulator.

use super::*;

/// Answers each call with its own path.
fn echo(seen: &Seen) -> Reply {
    Reply::data(json!([{"node": "pve1", "status": seen.path, "volid": seen.path}]))
}

async fn volume(c: &Client, storage: &str) -> String {
    c.storage_content(storage, None).await.unwrap()[0].id.clone()
}

fn path_of(storage: &str) -> String {
    format!("/nodes/pve1/storage/{storage}/content")
}

/// Waits until no more than these connections are left; the server learns of an end a little later.
async fn settled(fake: &Fake, connections: usize) {
    let begun = Instant::now();
    while fake.open_connections() > connections {
        assert!(begun.elapsed() < Duration::from_secs(2), "{}", fake.open_connections());
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_second_answer_is_never_taken_for_that_of_the_next_call() {
    let fake = Fake::start(|seen| Reply::Twice(Box::new(echo(seen)))).await;
    let c = client(&fake);
    for n in 0..20 {
        let storage = format!("s{n}");
        assert_eq!(volume(&c, &storage).await, path_of(&storage));
    }
}

#[tokio::test]
async fn an_abandoned_call_does_not_leave_its_answer_to_the_next() {
    let fake = Fake::start(|seen| match seen.path.contains("slow") {
        true => Reply::Later(Duration::from_millis(200), Box::new(echo(seen))),
        false => echo(seen),
    })
    .await;
    let c = client(&fake);
    assert_eq!(volume(&c, "first").await, path_of("first"));
    for _ in 0..3 {
        let slow = tokio::time::timeout(Duration::from_millis(50), volume(&c, "slow")).await;
        assert!(slow.is_err());
        assert_eq!(volume(&c, "next").await, path_of("next"));
    }
    // The connections of the abandoned calls are gone.
    settled(&fake, 1).await;
}

#[tokio::test]
async fn parallel_calls_get_their_own_answers_and_few_connections_stay() {
    let fake = Fake::start(|seen| {
        let pause = Duration::from_millis(10 * (seen.number as u64 % 3));
        Reply::Later(pause, Box::new(echo(seen)))
    })
    .await;
    let c = client(&fake);
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..16 {
        let c = c.clone();
        calls.spawn(async move {
            for m in 0..5 {
                let storage = format!("s{n}-{m}");
                assert_eq!(volume(&c, &storage).await, path_of(&storage));
            }
        });
    }
    while let Some(ended) = calls.join_next().await {
        ended.unwrap();
    }
    settled(&fake, 2).await;
}

#[tokio::test]
async fn a_late_answer_within_the_limit_is_one() {
    let late = Duration::from_millis(1500);
    let fake = Fake::start(move |seen| Reply::Later(late, Box::new(contract(seen)))).await;
    client(&fake).start(id(110)).await.unwrap();
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn a_rotated_certificate_is_refused_by_its_fingerprint_and_no_session_outlives_it() {
    // Each answer ends its connection, so that each call shows the certificate anew.
    let answer = |_: &Seen| {
        let body = json!({"data": [{"node": "pve1"}]}).to_string();
        Reply::Raw(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
    };
    let fake = Fake::start(answer).await;
    let pinned = client(&fake);
    let by_authority = Client::new(&config(&fake, Trust::CaFile(fake.ca_file.clone()))).unwrap();
    pinned.check().await.unwrap();
    by_authority.check().await.unwrap();
    let new = fake.rotate_certificate();
    let error = pinned.start(id(110)).await.unwrap_err();
    let Error::FingerprintMismatch { presented, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*presented, new);
    assert!(!error.is_unclear());
    let error = by_authority.start(id(110)).await.unwrap_err();
    assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
    assert_eq!(fake.seen().len(), 2, "the token was sent to an unknown server");
}

#[tokio::test]
async fn the_front_end_s_own_errors_are_read_back() {
    for status in
        ["595 x", "596 Broken pipe", "599 Too many redirections", "502 Bad Gateway", "504 x"]
    {
        let now = unix_time();
        let fake = Fake::start(move |seen| match seen.method.as_str() {
            "POST" => Reply::Raw(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")),
            _ => Reply::data(json!([{ "upid": upid("vzstart", 110, now) }])),
        })
        .await;
        client(&fake).start(id(110)).await.unwrap();
        assert_eq!(changes(&fake), 1, "{status}");
    }
}

#[tokio::test]
async fn an_answer_without_end_is_cut_off() {
    let too_long = 17 << 20;
    for (length, body) in [
        // Refused before it is read.
        (format!("Content-Length: {too_long}\r\n"), String::new()),
        // It ends with the connection.
        (String::new(), "x".repeat(too_long)),
    ] {
        let reply = format!("HTTP/1.1 200 OK\r\n{length}\r\n{body}");
        let fake = Fake::start(move |_| Reply::Raw(reply.clone())).await;
        let mut config = config(&fake, pin(&fake));
        // To read so much takes a while where there is much else to do.
        config.proxmox.request_timeout = Duration::from_secs(30);
        let error = Client::new(&config).unwrap().check().await.unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
    // Heads too.
    let fake = Fake::start(|_| {
        Reply::Raw(format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(1 << 20)))
    })
    .await;
    client(&fake).check().await.unwrap_err();
}

#[tokio::test]
async fn an_answer_without_data_or_with_more_than_known_is_understood() {
    let fake = Fake::start(|seen| match seen.method.as_str() {
        // `data` is missing after a PUT, in some releases.
        "PUT" => Reply::Json(json!({"success": 1})),
        _ => Reply::Json(json!({
            "data": {"status": "stopped", "vmid": "110", "new": {"deep": [1]}, "pid": "0"},
            "total": 1, "changes": null,
        })),
    })
    .await;
    let c = client(&fake);
    c.put_config(id(110), &[("tags", "a")], None).await.unwrap();
    let status = c.status(id(110)).await.unwrap();
    assert_eq!((status.vmid, status.running, status.pid), (id(110), false, None));
}

#[tokio::test]
async fn reading_back_ends_in_time_too() {
    // Everything is slow, but nothing is silent.
    let fake = Fake::start(|seen| match seen.method.as_str() {
        "POST" => Reply::Close,
        _ => Reply::Later(Duration::from_millis(1500), Box::new(Reply::data(json!([])))),
    })
    .await;
    let begun = Instant::now();
    let error = client(&fake).start(id(110)).await.unwrap_err();
    assert!(error.is_unclear(), "{error:?}");
    // 2 s as for each call, and 1.5 s of pauses; it would be 9 s.
    assert!(begun.elapsed() < Duration::from_millis(6000), "{:?}", begun.elapsed());
}
