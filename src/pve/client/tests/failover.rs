//! Several endpoints.

use super::*;

/// A client of several servers, all trusted.
fn cluster(fakes: &[&Fake]) -> Client {
    let mut config = config(fakes[0], pin(fakes[0]));
    config.proxmox.endpoints = fakes.iter().map(|fake| fake.url()).collect();
    config.proxmox.trust = Trust::Fingerprints(fakes.iter().map(|fake| fake.fingerprint).collect());
    Client::new(&config).unwrap()
}

/// An endpoint where nobody listens.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("https://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn a_get_goes_on_to_the_next_endpoint_which_is_asked_first_from_then_on() {
    let broken = Fake::start(|_| Reply::Close).await;
    let good = Fake::start(contract).await;
    let c = cluster(&[&broken, &good]);
    c.check().await.unwrap();
    c.status(id(110)).await.unwrap();
    // As often as a GET is repeated, and then no more.
    assert_eq!((broken.seen().len(), good.seen().len()), (3, 2));
}

#[tokio::test]
async fn the_first_endpoint_is_preferred() {
    let (first, second) = (Fake::start(contract).await, Fake::start(contract).await);
    let c = cluster(&[&first, &second]);
    for _ in 0..3 {
        c.check().await.unwrap();
    }
    assert_eq!((first.seen().len(), second.seen().len()), (3, 0));
}

#[tokio::test]
async fn a_silent_endpoint_leaves_a_get_time_for_the_next() {
    let silent = Fake::start(|_| Reply::Silence).await;
    let good = Fake::start(contract).await;
    let begun = Instant::now();
    cluster(&[&silent, &good]).check().await.unwrap();
    // Half of the 2 s.
    assert!(begun.elapsed() < Duration::from_millis(1900), "{:?}", begun.elapsed());
    assert_eq!(silent.seen().len(), 1);
}

#[tokio::test]
async fn a_change_that_was_not_sent_goes_to_the_next_endpoint() {
    let good = Fake::start(contract).await;
    let impostor = Fake::start(contract).await;
    let mut config = config(&good, pin(&good));
    config.proxmox.endpoints = vec![nobody(), impostor.url(), good.url()];
    let c = Client::new(&config).unwrap();
    assert_eq!(c.start(id(110)).await.unwrap().kind(), "vzstart");
    assert_eq!(good.calls(), ["POST /nodes/pve1/lxc/110/status/start"]);
    assert!(impostor.seen().is_empty(), "the token was sent to an unknown server");
}

#[tokio::test]
async fn a_change_that_may_have_been_received_is_read_back_and_sent_nowhere_else() {
    let now = unix_time();
    let first = Fake::start(|_| Reply::Close).await;
    let second = Fake::start(move |seen| match seen.method.as_str() {
        "GET" => Reply::data(json!([{ "upid": upid("vzstart", 110, now) }])),
        _ => panic!("{seen:?}"),
    })
    .await;
    let found = cluster(&[&first, &second]).start(id(110)).await.unwrap();
    assert_eq!(found.to_string(), upid("vzstart", 110, now));
    assert_eq!((changes(&first), changes(&second)), (1, 0));
}

#[tokio::test]
async fn an_answer_is_an_answer_also_if_it_is_a_refusal() {
    for name in
        ["err-bad-token", "err-no-permission-config", "err-ct-missing-config", "err-path-unknown"]
    {
        let first = Fake::start(move |_| Reply::recorded(name)).await;
        let second = Fake::start(|_| panic!("asked another endpoint")).await;
        cluster(&[&first, &second]).config(id(100)).await.unwrap_err();
        assert_eq!(first.seen().len(), 1, "{name}");
    }
}

#[tokio::test]
async fn a_front_end_that_cannot_reach_the_node_is_not_the_only_one() {
    let cut_off = Fake::start(|_| {
        Reply::Raw("HTTP/1.1 595 No route to host\r\nContent-Length: 0\r\n\r\n".into())
    })
    .await;
    let good = Fake::start(contract).await;
    cluster(&[&cut_off, &good]).status(id(110)).await.unwrap();
}

#[tokio::test]
async fn if_none_can_be_reached_the_first_error_tells_why() {
    let fake = Fake::start(contract).await;
    let mut config = config(&fake, pin(&fake));
    let (first, second) = (nobody(), nobody());
    config.proxmox.endpoints = vec![first.clone(), second];
    for error in [
        Client::new(&config).unwrap().check().await.unwrap_err(),
        Client::new(&config).unwrap().start(id(110)).await.unwrap_err(),
    ] {
        assert!(matches!(&error, Error::Unreachable { sent: false, .. }), "{error:?}");
        assert!(error.to_string().contains(&first), "{error}");
    }
}

#[test]
fn an_endpoint_that_failed_comes_last_for_a_while() {
    let tls = tls::connector(&Trust::Fingerprints(vec![Fingerprint([0; 32])])).unwrap();
    let server = |host| Server::new(host, tls.clone(), Duration::from_secs(1)).unwrap();
    let servers: Vec<_> = ["https://a:1", "https://b:1", "https://[::1]:1"].map(server).into();
    let endpoints = Endpoints::new(servers.clone());
    let begun = Instant::now();
    let order = |now| -> String {
        endpoints.in_order(now).iter().map(|server| &server.url()[8..9]).collect()
    };
    assert_eq!(order(begun), "ab[");
    endpoints.failed(&servers[0], begun);
    assert_eq!(order(begun), "b[a");
    let later = begun + REST / 2;
    endpoints.failed(&servers[1], later);
    assert_eq!(order(later), "[ab");
    assert_eq!(order(begun + REST), "a[b");
    assert_eq!(order(later + REST), "ab[");
    assert_eq!(endpoints.preferred(), "https://[::1]:1");
}
