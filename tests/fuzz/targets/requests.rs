//! Whole requests to a node with its stores: no answer is a 5xx but 503, every refusal is a problem
//! document, and none is waited for in vain.
//!
//! An input is one digit that says who asks (nobody, a buyer, an operator), then the request line
//! without its version, headers, an empty line, and the body. `{id}` is an id that there is.
#![no_main]

use std::{
    env,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    sync::LazyLock,
    time::Duration,
};

use libfuzzer_sys::{Corpus, fuzz_target};
use secrecy::ExposeSecret;
use serde_json::Value;
use stockade::{
    app::{self, Role},
    auth::{
        self,
        token::{Identity, Secret, TokenKeys},
    },
    clock,
    config::Config,
    embedded,
    lifecycle::Lifecycle,
};
use tokio::runtime::Runtime;
use uuid::Uuid;

/// How long any answer may take: as long as an honest client waits.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node of this process, on the stores of the server whose data directory the environment names.
struct Node {
    addr: SocketAddr,
    keys: TokenKeys,
    /// A buyer and an operator.
    users: [Uuid; 2],
    /// Ids of things that are there, by the collection that they are in.
    ids: Vec<(&'static str, String)>,
    _runtime: Runtime,
}

/// An answer's status, media type, and body.
struct Answer {
    status: u16,
    media_type: String,
    body: Vec<u8>,
}

static NODE: LazyLock<Node> = LazyLock::new(Node::start);

impl Node {
    fn start() -> Self {
        let data_dir = PathBuf::from(env::var_os("STOCKADE_DATA_DIR").unwrap());
        let endpoints = embedded::running(&data_dir).unwrap();
        let secret = embedded::jwt_secret(&data_dir).unwrap();
        let bytes = secret.expose_secret().as_bytes();
        let keys = TokenKeys::new(&[Secret { id: "1", bytes }], 600).unwrap();
        let vars = [
            ("STOCKADE_HTTP_ADDR", "127.0.0.1:0"),
            ("STOCKADE_RATE_LIMIT", "off"),
            ("STOCKADE_JWT_SECRET", secret.expose_secret()),
        ];
        let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let config = Config::load(vars).unwrap();
        let runtime = Runtime::new().unwrap();
        let life = Lifecycle::new();
        let started = app::start(&config, &endpoints, Role::ALL, &life);
        let addr = runtime.block_on(started).unwrap().http_addr.unwrap();
        runtime.spawn(async move { life.run().await });
        let mut node = Self {
            addr,
            keys,
            users: [clock::new_id(), clock::new_id()],
            ids: Vec::new(),
            _runtime: runtime,
        };
        node.stock();
        node
    }

    /// Waits until it sells, and sells something.
    fn stock(&mut self) {
        while self.ask(b'0', "GET /readyz", "", b"").status != 200 {}
        let product =
            r#"{"name": "Lamp", "description": "", "price": {"amount": 1999, "currency": "EUR"}}"#;
        self.make("products", b'2', "/v1/products", product);
        let sale = format!(
            r#"{{"product_id": "{}", "allocation": 1000000, "per_buyer_limit": 100, "opens_at": "2020-01-01T00:00:00Z"}}"#,
            self.ids[0].1
        );
        self.make("sales", b'2', "/v1/sales", &sale);
        let path = format!("/v1/sales/{}/orders", self.ids[1].1);
        self.make("orders", b'1', &path, r#"{"quantity": 1}"#);
    }

    fn make(&mut self, collection: &'static str, who: u8, path: &str, body: &str) {
        let headers = "content-type: application/json\nidempotency-key: made";
        let answer = self.ask(who, &format!("POST {path}"), headers, body.as_bytes());
        let made: Value = serde_json::from_slice(&answer.body).unwrap();
        let id = made["id"].as_str().unwrap_or_else(|| panic!("{made}"));
        self.ids.push((collection, id.to_owned()));
    }

    fn ask(&self, who: u8, line: &str, headers: &str, body: &[u8]) -> Answer {
        let mut request = format!("{line} HTTP/1.1\r\nhost: fuzz\r\nconnection: close\r\n");
        for header in headers.lines() {
            let name = header.split(':').next().unwrap_or_default().trim();
            // What frames the request is not the input's to say, and who asks neither.
            let ours = [
                "authorization",
                "connection",
                "content-length",
                "expect",
                "transfer-encoding",
                "upgrade",
            ];
            if !ours.iter().any(|known| name.eq_ignore_ascii_case(known)) {
                request.push_str(header.trim_end_matches('\r'));
                request.push_str("\r\n");
            }
        }
        let role = match who {
            b'1' => Some((self.users[0], auth::Role::Buyer)),
            b'2' => Some((self.users[1], auth::Role::Operator)),
            _ => None,
        };
        if let Some((user, role)) = role {
            let identity = Identity {
                user,
                role,
                session: None,
            };
            let token = self
                .keys
                .mint(identity, clock::new_id(), clock::now())
                .unwrap();
            request.push_str(&format!("authorization: Bearer {token}\r\n"));
        }
        request.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        self.send(request.as_bytes(), body)
    }

    fn send(&self, head: &[u8], body: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // Whoever refuses a head may close before it has read the body.
        let _ = stream.write_all(head).and_then(|()| stream.write_all(body));
        let mut text = Vec::new();
        let mut bytes = [0; 16 * 1024];
        loop {
            match stream.read(&mut bytes) {
                Ok(0) => break,
                Ok(length) => text.extend_from_slice(&bytes[..length]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                // The fuzzer's own alarm.
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => panic!("no answer: {error}"),
            }
            let answer = Answer::read(&text);
            if answer.is_some_and(|answer| answer.media_type.contains("event-stream")) {
                // It has begun, and never ends.
                break;
            }
        }
        Answer::read(&text).unwrap_or_else(|| panic!("no head: {}", String::from_utf8_lossy(&text)))
    }
}

impl Answer {
    /// `None` while the head is not complete.
    fn read(text: &[u8]) -> Option<Self> {
        let end = text.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&text[..end]).to_lowercase();
        let media_type = head
            .lines()
            .find_map(|line| line.strip_prefix("content-type:"));
        Some(Self {
            status: head.split(' ').nth(1)?.parse().ok()?,
            media_type: media_type.unwrap_or_default().trim().to_owned(),
            body: text[end + 4..].to_vec(),
        })
    }
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((who, rest)) = input.split_first() else {
        return Corpus::Reject;
    };
    let end = rest.windows(2).position(|two| two == b"\n\n");
    let (head, body) = match end {
        Some(end) => (&rest[..end], &rest[end + 2..]),
        None => (rest, &[][..]),
    };
    let Ok(head) = str::from_utf8(head) else {
        return Corpus::Reject;
    };
    let (line, headers) = head.split_once('\n').unwrap_or((head, ""));
    if !line.contains(' ') || line.contains('\r') {
        return Corpus::Reject;
    }
    let mut line = line.to_owned();
    for (collection, id) in &NODE.ids {
        line = line.replace(
            &format!("/{collection}/{{id}}"),
            &format!("/{collection}/{id}"),
        );
    }
    let line = line.replace("{id}", &Uuid::nil().to_string());
    let answer = NODE.ask(*who, &line, headers, body);
    let said = String::from_utf8_lossy(&answer.body);
    let Answer {
        status, media_type, ..
    } = &answer;
    assert!(*status < 500 || *status == 503, "{line}: {status} {said}");
    // What cannot even be read as HTTP is refused by the parser, without words.
    if *status >= 400 && !said.is_empty() {
        assert_eq!(
            media_type, "application/problem+json",
            "{line}: {status} {said}"
        );
    }
    Corpus::Keep
});
