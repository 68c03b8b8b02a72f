//! Connections themselves: too many, too slow, too large, and encrypted.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use futures::future::join_all;
use reqwest::{Certificate, Client, Method, Version};
use rustix::process::{Signal, getpid, kill_process};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use uuid::Uuid;

use super::support::app::{App, PATIENCE, id, send};

/// Connections from one address in the tests that count them.
const PER_ADDRESS: usize = 20;

/// A connection from another address of this machine.
async fn connect(app: &App, from: [u8; 4]) -> TcpStream {
    let to: SocketAddr = app.url.split("//").nth(1).unwrap().parse().unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((IpAddr::from(from), 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

/// What the server has to say until it hangs up.
async fn last_words(socket: &mut TcpStream) -> String {
    let mut words = Vec::new();
    // A reset is a way of hanging up, too.
    let _ = timeout(PATIENCE, socket.read_to_end(&mut words))
        .await
        .unwrap();
    String::from_utf8_lossy(&words).into_owned()
}

#[tokio::test]
async fn hundreds_of_half_requests_take_no_seat_from_others() {
    let per_address = PER_ADDRESS.to_string();
    let app = App::start_with(&[
        ("STOCKADE_RATE_LIMIT", "on"),
        ("STOCKADE_CONNECTIONS_PER_ADDRESS", &per_address),
    ])
    .await;
    let sale = app.sale(json!({})).await;
    let half = async |number: u32| {
        let mut socket = connect(&app, [127, 0, 0, 2]).await;
        let head = format!("POST /v1/sales/{number}/orders HTTP/1.1\r\nhost: x\r\ncontent-le");
        // Those who were turned away may not get it out.
        let _ = socket.write_all(head.as_bytes()).await;
        socket
    };
    let mut loris = join_all((0..400).map(half)).await;
    app.buy(id(&sale), Uuid::from_u128(1), "k", 1)
        .await
        .expect(201);
    let metrics = app.get("/metrics").await.text;
    let refused = format!(
        "stockade_limits_connections_refused_total {}",
        400 - PER_ADDRESS
    );
    assert!(metrics.contains(&refused), "{metrics}");

    // Those who were let in are not waited for either, and then there is room again.
    for socket in &mut loris {
        last_words(socket).await;
    }
    let mut again = connect(&app, [127, 0, 0, 2]).await;
    again
        .write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    assert!(last_words(&mut again).await.starts_with("HTTP/1.1 200 "));
    app.finish().await;
}

#[tokio::test]
async fn a_body_that_does_not_come_has_done_nothing_for_sure() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let token = app.token(Uuid::from_u128(1), stockade::auth::Role::Buyer);
    let mut socket = connect(&app, [127, 0, 0, 1]).await;
    let head = format!(
        "POST /v1/sales/{}/orders HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\
         idempotency-key: k\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n{{\"quantity\"",
        id(&sale)
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let answer = last_words(&mut socket).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    for part in [
        "\"code\":\"request_timeout\"",
        "\"outcome\":\"not_applied\"",
        "retry-after: 1\r\n",
    ] {
        assert!(answer.contains(part), "{answer}");
    }
    assert_eq!(app.view(id(&sale)).await["remaining"], 5);
    app.finish().await;
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let app = App::start().await;
    let many = "x: y\r\n".repeat(101);
    let long = format!("x: {}\r\n", "y".repeat(70_000));
    let address = format!("/{}", "y".repeat(70_000));
    for (uri, headers) in [
        ("/livez", &many),
        ("/livez", &long),
        (&address, &String::new()),
    ] {
        let mut socket = connect(&app, [127, 0, 0, 1]).await;
        let head = format!("GET {uri} HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        let _ = socket.write_all(head.as_bytes()).await;
        let answer = last_words(&mut socket).await;
        assert!(
            answer.starts_with("HTTP/1.1 431 ") || answer.starts_with("HTTP/1.1 414 "),
            "{answer}"
        );
    }
    app.get("/livez").await.expect(200);
    app.abandon().await;
}

/// A certificate for this machine, and its key, in two files.
struct Identity {
    dir: TempDir,
}

impl Identity {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let identity = Self { dir };
        identity.renew();
        identity
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes another pair over the old one.
    fn renew(&self) {
        let names = [Ipv4Addr::LOCALHOST.to_string()];
        let pair = rcgen::generate_simple_self_signed(names).unwrap();
        fs::write(self.file("certificate.pem"), pair.cert.pem()).unwrap();
        fs::write(self.file("key.pem"), pair.signing_key.serialize_pem()).unwrap();
    }

    /// A client that believes in nothing else.
    fn client(&self, http1: bool) -> Client {
        let pem = fs::read(self.file("certificate.pem")).unwrap();
        let builder = Client::builder().tls_certs_only([Certificate::from_pem(&pem).unwrap()]);
        let builder = if http1 { builder.http1_only() } else { builder };
        builder.build().unwrap()
    }
}

#[tokio::test]
async fn over_tls_everything_works_with_either_protocol() {
    let identity = Identity::new();
    let (certificate, key) = (identity.file("certificate.pem"), identity.file("key.pem"));
    let mut app = App::without_node(&[
        ("STOCKADE_TLS_CERT", certificate.to_str().unwrap()),
        ("STOCKADE_TLS_KEY", key.to_str().unwrap()),
    ])
    .await;
    app.client = identity.client(false);
    app.run().await;
    let sale = app.sale(json!({})).await;
    for (http1, version, buyer) in [(false, Version::HTTP_2, 1), (true, Version::HTTP_11, 2)] {
        app.client = identity.client(http1);
        let answer = app
            .buy(id(&sale), Uuid::from_u128(buyer), "k", 1)
            .await
            .expect(201);
        assert_eq!(
            answer.header("strict-transport-security"),
            Some("max-age=31536000")
        );
        let path = format!("/v1/sales/{}/events", id(&sale));
        let mut events = app.request(Method::GET, &path).send().await.unwrap();
        assert_eq!((events.status().as_u16(), events.version()), (200, version));
        let mut seen = String::new();
        while !seen.contains("\"remaining\":") {
            seen += std::str::from_utf8(&events.chunk().await.unwrap().unwrap()).unwrap();
        }
    }

    // Whoever does not encrypt is not served, and stops nobody.
    let mut plain = connect(&app, [127, 0, 0, 1]).await;
    plain
        .write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    assert!(!last_words(&mut plain).await.contains("200"));

    // Another certificate, without a restart; first one that is none, which changes nothing.
    fs::write(&certificate, "nothing").unwrap();
    kill_process(getpid(), Signal::HUP).unwrap();
    send(app.request(Method::GET, "/livez")).await.expect(200);
    identity.renew();
    kill_process(getpid(), Signal::HUP).unwrap();
    let renewed = async {
        loop {
            app.client = identity.client(false);
            if app.request(Method::GET, "/livez").send().await.is_ok() {
                break;
            }
        }
    };
    timeout(PATIENCE, renewed).await.unwrap();
    app.finish().await;
}
