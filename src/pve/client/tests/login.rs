//! Tickets.

use std::sync::Mutex;

use super::*;

const PASSWORD: &str = "planted password: &=ü";
const TICKET: &str = "PVE:root@pam:6B01F13F::planted+ticket/=";
const CSRF: &str = "6B01F13F:planted-csrf+/=";

/// Logs in as root@pam.
fn user(fake: &Fake) -> Client {
    let mut config = config(fake, pin(fake));
    let path = fake.dir.path().join("token");
    std::fs::write(&path, format!("root@pam:{PASSWORD}\n")).unwrap();
    config.proxmox.login = crate::config::Login::Password(path);
    Client::new(&config).unwrap()
}

/// The recorded answer to a login, with this ticket.
fn ticket(text: &str) -> Reply {
    let mut data = recorded("access-ticket-ok").data().clone();
    data["ticket"] = text.into();
    data["CSRFPreventionToken"] = CSRF.into();
    Reply::data(data)
}

fn secret_of(seen: &Seen) -> String {
    let form: std::collections::BTreeMap<_, _> =
        form_urlencoded::parse(seen.body.as_bytes()).into_owned().collect();
    assert_eq!(form["username"], "root@pam");
    form["password"].clone()
}

fn is_login(seen: &Seen) -> bool {
    seen.is("POST", "/access/ticket")
}

#[tokio::test]
async fn one_ticket_serves_all_calls_and_changes_carry_the_csrf_token() {
    let fake =
        Fake::start(|seen| if is_login(seen) { ticket(TICKET) } else { contract(seen) }).await;
    let c = user(&fake);
    c.check().await.unwrap();
    c.start(id(110)).await.unwrap();
    c.destroy(id(180)).await.unwrap();
    c.put_config(id(500), &[("tags", "a")], None).await.unwrap();
    let seen = fake.seen();
    assert_eq!(seen.iter().filter(|s| is_login(s)).count(), 1);
    assert_eq!(secret_of(&seen[0]), PASSWORD);
    assert!(seen[0].header("cookie").is_empty());
    for call in &seen[1..] {
        assert_eq!(call.header("cookie"), format!("PVEAuthCookie={TICKET}"));
        assert_eq!(
            call.header("csrfpreventiontoken"),
            if call.method == "GET" { "" } else { CSRF }
        );
        assert!(call.header("authorization").is_empty());
    }
}

#[tokio::test]
async fn a_ticket_is_renewed_with_itself_and_a_dead_one_with_the_password() {
    let count = AtomicUsize::new(0);
    let fake = Fake::start(move |seen| match is_login(seen) {
        true => ticket(&format!("{TICKET}{}", count.fetch_add(1, Ordering::SeqCst))),
        false => contract(seen),
    })
    .await;
    let c = user(&fake);
    let logins =
        || -> Vec<_> { fake.seen().iter().filter(|s| is_login(s)).map(secret_of).collect() };
    c.check().await.unwrap();
    c.inner.credentials.age(Duration::from_secs(3000));
    c.check().await.unwrap();
    assert_eq!(logins(), [PASSWORD]);
    c.inner.credentials.age(Duration::from_secs(1000));
    c.check().await.unwrap();
    assert_eq!(logins(), [PASSWORD.to_owned(), format!("{TICKET}0")]);
    assert_eq!(fake.seen().last().unwrap().header("cookie"), format!("PVEAuthCookie={TICKET}1"));
    c.inner.credentials.age(Duration::from_secs(7200));
    c.check().await.unwrap();
    assert_eq!(logins()[2..], [PASSWORD]);
}

#[tokio::test]
async fn a_ticket_that_died_early_is_replaced_once_and_the_call_repeated() {
    // As after a restart with new keys: the first ticket is refused from the second call on.
    let fake = Fake::start(|seen| match seen.number {
        0 | 3 => ticket(&format!("{TICKET}{}", seen.number)),
        2 => Reply::recorded("err-bad-ticket"),
        _ => contract(seen),
    })
    .await;
    let c = user(&fake);
    c.check().await.unwrap();
    assert_eq!(c.start(id(110)).await.unwrap().kind(), "vzstart");
    let start = "POST /nodes/pve1/lxc/110/status/start";
    let login = "POST /access/ticket";
    assert_eq!(fake.calls(), [login, "GET /nodes", start, login, start]);
    assert_eq!(secret_of(&fake.seen()[3]), PASSWORD);
}

#[tokio::test]
async fn a_new_ticket_that_is_refused_is_an_error() {
    let fake = Fake::start(|seen| match is_login(seen) {
        true => ticket(TICKET),
        false => Reply::recorded("err-csrf-missing"),
    })
    .await;
    let error = user(&fake).start(id(110)).await.unwrap_err();
    assert!(matches!(error, Error::Authentication { .. }), "{error:?}");
    assert!(error.to_string().contains("invalid csrf token"), "{error}");
    assert_eq!(fake.seen().len(), 2);
}

#[tokio::test]
async fn a_renewal_that_is_refused_falls_back_to_the_password() {
    let fake = Fake::start(|seen| match seen.number {
        0 | 3 => ticket(TICKET),
        2 => Reply::recorded("access-ticket-bad-password"),
        _ => contract(seen),
    })
    .await;
    let c = user(&fake);
    c.check().await.unwrap();
    c.inner.credentials.age(Duration::from_secs(4000));
    c.check().await.unwrap();
    let seen = fake.seen();
    assert_eq!([secret_of(&seen[2]), secret_of(&seen[3])], [TICKET, PASSWORD]);
}

#[tokio::test]
async fn a_wrong_password_names_user_and_file() {
    let fake = Fake::start(|_| Reply::recorded("access-ticket-bad-password")).await;
    let error = user(&fake).start(id(110)).await.unwrap_err();
    let text = error.to_string();
    for part in ["the user root@pam", "authentication failure", fake.dir.path().to_str().unwrap()] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("token list"), "{text}");
    assert_eq!(fake.calls(), ["POST /access/ticket"]);
}

#[tokio::test]
async fn a_login_that_is_lost_is_repeated_and_leaves_no_doubt_about_the_call() {
    let fake = Fake::start(|seen| match seen.number {
        0 | 1 => Reply::Close,
        2 => ticket(TICKET),
        _ => contract(seen),
    })
    .await;
    user(&fake).start(id(110)).await.unwrap();
    assert_eq!(fake.seen().len(), 4);
    for reply in
        [|| Reply::Close, || Reply::Silence, || Reply::data(json!({}))] as [fn() -> Reply; 3]
    {
        let fake = Fake::start(move |_| reply()).await;
        let error = user(&fake).start(id(110)).await.unwrap_err();
        assert!(!error.is_unclear(), "{error:?}");
        assert!(fake.seen().iter().all(is_login), "{:?}", fake.calls());
    }
}

#[tokio::test]
async fn a_second_factor_is_told() {
    let fake = Fake::start(|_| {
        Reply::data(json!({"ticket": "PVE:!tfa!x", "CSRFPreventionToken": "c", "NeedTFA": 1}))
    })
    .await;
    let error = user(&fake).check().await.unwrap_err();
    assert!(error.to_string().contains("second factor; use an API token"), "{error}");
}

/// Everything that was logged by this process.
static LOGGED: Mutex<String> = Mutex::new(String::new());

struct Capture;

impl log::Log for Capture {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        struct Pairs<'a>(&'a mut String);
        impl<'kvs> log::kv::VisitSource<'kvs> for Pairs<'_> {
            fn visit_pair(
                &mut self,
                key: log::kv::Key<'kvs>,
                value: log::kv::Value<'kvs>,
            ) -> Result<(), log::kv::Error> {
                self.0.push_str(&format!("{key}={value} {value:?} "));
                Ok(())
            }
        }
        let mut text = format!("{} {} ", record.target(), record.args());
        let _ = record.key_values().visit(&mut Pairs(&mut text));
        LOGGED.lock().unwrap().push_str(&(text + "\n"));
    }

    fn flush(&self) {}
}

#[tokio::test]
async fn no_secret_is_in_debug_output_errors_or_logs() {
    log::set_boxed_logger(Box::new(Capture)).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let mut shown = String::new();
    for name in ["err-bad-ticket", "err-path-unknown", "err-no-permission-config", "err-bad-param"]
    {
        let fake = Fake::start(move |seen| match is_login(seen) {
            true => ticket(TICKET),
            false => Reply::recorded(name),
        })
        .await;
        for c in [user(&fake), client(&fake)] {
            for error in [c.check().await.unwrap_err(), c.start(id(110)).await.unwrap_err()] {
                shown.push_str(&format!("{error} {error:?} {c:?} {:?}\n", c.inner.credentials));
            }
        }
        // What an endpoint that breaks in the middle makes of it.
        let fake =
            Fake::start(|seen| if is_login(seen) { ticket(TICKET) } else { Reply::Close }).await;
        for c in [user(&fake), client(&fake)] {
            let error = c.start(id(110)).await.unwrap_err();
            shown.push_str(&format!("{error} {error:?}\n"));
        }
        let fake = Fake::start(|_| {
            Reply::data(json!({"ticket": format!("{TICKET}\n"), "CSRFPreventionToken": CSRF}))
        })
        .await;
        let error = user(&fake).check().await.unwrap_err();
        shown.push_str(&format!("{error} {error:?}\n"));
    }
    let logged = LOGGED.lock().unwrap().clone();
    assert!(logged.contains("proxmox call") && logged.contains("answer lost"), "{logged}");
    for text in [&shown, &logged] {
        let text = text.to_lowercase();
        for secret in ["planted", &SECRET[..8]] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}
