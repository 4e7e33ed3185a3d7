//! Uploads.

use std::path::PathBuf;

use super::*;
use crate::pve::Upload;

fn file(fake: &Fake, size: usize) -> PathBuf {
    let path = fake.dir.path().join("template");
    let pattern: Vec<u8> = (0..size).map(|n| b'a' + (n % 23) as u8).collect();
    std::fs::write(&path, pattern).unwrap();
    path
}

fn template(path: &std::path::Path) -> Upload<'_> {
    Upload { content: "vztmpl", name: "bb_1.0_amd64.tar.gz", path }
}

#[tokio::test]
async fn a_file_is_sent_as_a_form_while_it_is_read() {
    let fake = Fake::start(|_| Reply::recorded("storage-upload-vztmpl")).await;
    for size in [0, 1, 64 << 10, 3_000_001] {
        let path = file(&fake, size);
        let upid = client(&fake).upload("local", &template(&path), soon()).await.unwrap();
        assert_eq!((upid.kind(), upid.id()), ("imgcopy", ""));
        let seen = fake.seen().pop().unwrap();
        assert!(seen.is("POST", recorded("storage-upload-vztmpl").path()), "{}", seen.path);
        let boundary = seen.header("content-type").strip_prefix("multipart/form-data; boundary=");
        let boundary = boundary.unwrap();
        let content = std::fs::read_to_string(&path).unwrap();
        let expected = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"content\"\r\n\r\nvztmpl\r\n\
             --{boundary}\r\nContent-Disposition: form-data; name=\"filename\"; \
             filename=\"bb_1.0_amd64.tar.gz\"\r\n\r\n{content}\r\n--{boundary}--\r\n"
        );
        assert!(seen.body == expected, "{} bytes of {}", seen.body.len(), expected.len());
        assert_eq!(seen.header("content-length"), expected.len().to_string());
    }
}

#[tokio::test]
async fn a_name_that_could_leave_its_header_is_not_sent() {
    let fake = Fake::start(|_| panic!("sent")).await;
    let path = file(&fake, 1);
    for name in ["", "a\"b", "a\r\nb", "a/b", "../x", ".hidden", "ü", "a b"] {
        let upload = Upload { name, ..template(&path) };
        let error = client(&fake).upload("local", &upload, soon()).await.unwrap_err();
        assert!(matches!(error, Error::Unsendable { .. }), "{name}: {error:?}");
        assert!(!error.to_string().contains('\n') && !error.is_unclear(), "{error}");
    }
    let gone = fake.dir.path().join("none");
    let error = client(&fake).upload("local", &template(&gone), soon()).await.unwrap_err();
    assert!(error.to_string().contains(gone.to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn an_upload_that_is_refused_before_its_end_tells_why() {
    // Read no further than its head, as the real server does with what it does not want.
    let head = "HTTP/1.1 403 Permission check failed (/storage/local, Datastore.AllocateTemplate)\r\n\
                Content-Type: application/json\r\nContent-Length: 100\r\n\r\n";
    let body = r#"{"data":null,"message":"Permission check failed (/storage/local, Datastore.AllocateTemplate)\n"}"#;
    let head = head.replace("100", &body.len().to_string());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let fake = Fake::start(|_| panic!("sent")).await;
    let mut config = config(&fake, pin(&fake));
    config.proxmox.endpoints = vec![format!("https://{}", listener.local_addr().unwrap())];
    let acceptor = fake.acceptor();
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut stream = acceptor.accept(socket).await.unwrap();
        let mut some = [0; 1024];
        let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut some).await.unwrap();
        let answer = format!("{head}{body}");
        tokio::io::AsyncWriteExt::write_all(&mut stream, answer.as_bytes()).await.unwrap();
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    });
    let path = file(&fake, 8 << 20);
    let error =
        Client::new(&config).unwrap().upload("local", &template(&path), soon()).await.unwrap_err();
    let Error::Permission { privilege, .. } = &error else { panic!("{error:?}") };
    assert_eq!(privilege.as_deref(), Some("Datastore.AllocateTemplate"));
}

#[tokio::test]
async fn an_upload_ends_at_its_deadline() {
    let fake = Fake::start(|_| Reply::Silence).await;
    let path = file(&fake, 100);
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(200);
    let error = client(&fake).upload("local", &template(&path), deadline).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { sent: true, .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!(fake.seen().len(), 1);
}
