//! Connections themselves: too many, too slow, too large, and encrypted.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use futures::future::join_all;
use reqwest::{Certificate, Client, Method, Version};
use rustix::process::{Signal, getpid, kill_process};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{interval, timeout},
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

/// One request on a connection that stays, and its answer.
async fn ask(socket: &mut TcpStream) -> bool {
    let request = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut answer = [0; 12];
    socket.write_all(request).await.is_ok()
        && socket.read_exact(&mut answer).await.is_ok()
        && answer == *b"HTTP/1.1 200"
}

#[tokio::test]
async fn a_connection_on_which_nothing_is_asked_ends() {
    let app = App::start().await;
    let mut sockets = Vec::new();
    for _ in 0..3 {
        let mut socket = connect(&app, [127, 0, 0, 1]).await;
        assert!(ask(&mut socket).await);
        sockets.push(socket);
    }
    let [mut silent, mut slow, mut busy] = <[TcpStream; 3]>::try_from(sockets).unwrap();
    // Letters are no request, however many there are of them.
    let one_by_one = async {
        let mut letters = interval(Duration::from_secs(5));
        let (mut reader, mut writer) = slow.split();
        let mut rest = Vec::new();
        tokio::select! {
            _ = reader.read_to_end(&mut rest) => {}
            () = async {
                loop {
                    letters.tick().await;
                    let _ = writer.write_all(b"x").await;
                }
            } => {}
        }
    };
    let now_and_then = async {
        let mut requests = interval(Duration::from_secs(20));
        loop {
            requests.tick().await;
            let mut rest = [0; 4096];
            while busy.try_read(&mut rest).is_ok_and(|count| count > 0) {}
            assert!(ask(&mut busy).await, "whoever asks stays");
        }
    };
    // It takes more than a minute to be sure that nobody is there.
    let ended = timeout(6 * PATIENCE, async {
        let mut rest = Vec::new();
        let (_, ()) = tokio::join!(silent.read_to_end(&mut rest), one_by_one);
    });
    tokio::select! {
        ended = ended => ended.unwrap(),
        () = now_and_then => unreachable!(),
    }
    app.abandon().await;
}

/// A connection of HTTP/2, frame by frame: no library sends what an attacker sends.
struct Frames(TcpStream);

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    [&head, payload].concat()
}

/// GET, as a whole request of its own.
fn get(stream: u32, path: &str) -> Vec<u8> {
    // GET and http by their numbers in the table that everybody has; path and authority in letters.
    let mut block = vec![0x82, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
    block.extend(path.as_bytes());
    block.extend([0x01, 0x01, b'x']);
    frame(HEADERS, 0x05, stream, &block)
}

impl Frames {
    async fn connect(app: &App) -> Self {
        let mut socket = connect(app, [127, 0, 0, 1]).await;
        let hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        socket.write_all(hello).await.unwrap();
        let mut frames = Self(socket);
        frames.send(&frame(SETTINGS, 0, 0, &[])).await;
        frames
    }

    async fn send(&mut self, bytes: &[u8]) {
        // Whoever has been hung up on cannot get it out.
        let _ = self.0.write_all(bytes).await;
    }

    /// The next frame: its kind, its stream, what is in it; nothing at the end.
    async fn next(&mut self) -> Option<(u8, u32, Vec<u8>)> {
        let reading = async {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.ok()?;
            let [a, b, c, kind, _, w, x, y, z] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            self.0.read_exact(&mut payload).await.ok()?;
            Some((kind, u32::from_be_bytes([w, x, y, z]), payload))
        };
        timeout(PATIENCE, reading).await.unwrap()
    }
}

fn code(payload: &[u8]) -> u32 {
    u32::from_be_bytes(*payload.last_chunk().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_opens_and_resets_streams_is_hung_up_on() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let mut attacker = Frames::connect(&app).await;
    let mut flood = Vec::new();
    for stream in (1..10_000).step_by(2) {
        flood.extend(get(stream, "/v1/products"));
        flood.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
    }
    attacker.send(&flood).await;
    let mut farewell = None;
    while let Some((kind, _, payload)) = attacker.next().await {
        if kind == GOAWAY {
            farewell = payload.get(4..8).map(code);
        }
    }
    assert_eq!(farewell, Some(ENHANCE_YOUR_CALM));
    // The others notice nothing.
    app.buy(id(&sale), Uuid::from_u128(1), "k", 1)
        .await
        .expect(201);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_has_so_many_requests_under_way_and_no_more() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let path = format!("/v1/sales/{}/events", id(&sale));
    let mut client = Frames::connect(&app).await;
    let most = loop {
        let (kind, _, payload) = client.next().await.unwrap();
        if kind == SETTINGS && !payload.is_empty() {
            let said = payload.chunks(6).find(|said| said[..2] == [0, 3]);
            break code(said.expect("how many streams there may be"));
        }
    };
    assert!((1..=1_000).contains(&most), "{most}");
    // Streams of events never end.
    for number in 0..=most {
        client.send(&get(2 * number + 1, &path)).await;
    }
    let mut answered = 0;
    loop {
        let (kind, stream, payload) = client.next().await.expect("the others go on");
        match kind {
            HEADERS => answered += 1,
            RST_STREAM => {
                assert_eq!((stream, code(&payload)), (2 * most + 1, REFUSED_STREAM));
                break;
            }
            _ => assert_ne!(kind, GOAWAY),
        }
    }
    while answered < most {
        let (kind, ..) = client.next().await.expect("the others go on");
        answered += u32::from(kind == HEADERS);
    }
    app.finish().await;
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
