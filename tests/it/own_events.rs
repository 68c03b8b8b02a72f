//! What happens to a buyer's own orders, as it is told of it, and who else is not.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::DateTime;
use futures::future::join_all;
use reqwest::{Method, RequestBuilder, Response};
use rustix::process::Signal;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use stockade::{auth::Role, clock};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    selling::{ask, cancel, refused, strangers},
    support::{
        Redis,
        app::{App, Node, PATIENCE, crowd, id, insist, send, sql},
        variable,
        wire::Wire,
    },
};

const PATH: &str = "/v1/me/events";
const TICKETS: &str = "/v1/me/events/tickets";
const PASSWORD: &str = "correct horse battery";

/// One event, or the end of the stream.
#[derive(Clone, Debug, PartialEq)]
struct Told {
    name: String,
    data: Value,
}

/// Somebody who looks.
struct Stream {
    response: Response,
    text: String,
}

impl Stream {
    async fn of(request: RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        for (name, value) in [
            ("content-type", "text/event-stream"),
            ("cache-control", "no-store"),
            ("referrer-policy", "no-referrer"),
            ("x-accel-buffering", "no"),
        ] {
            assert_eq!(response.headers()[name], value);
        }
        Self {
            response,
            text: String::new(),
        }
    }

    /// The stream of a buyer without a session.
    async fn to(app: &App, buyer: Uuid) -> Self {
        Self::of(ask(app, Method::GET, buyer, PATH)).await
    }

    /// The next event; `None` when the stream is over.
    async fn next(&mut self) -> Option<Told> {
        loop {
            if let Some((said, rest)) = self.text.split_once("\n\n") {
                let (said, rest) = (said.to_owned(), rest.to_owned());
                self.text = rest;
                if said == ":" || said.starts_with("retry: ") {
                    continue;
                }
                let (name, data) = said.split_once('\n').unwrap();
                return Some(Told {
                    name: name.strip_prefix("event: ").unwrap().to_owned(),
                    data: serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap(),
                });
            }
            let piece = timeout(PATIENCE, self.response.chunk()).await.unwrap();
            let Some(piece) = piece.unwrap() else {
                assert_eq!(self.text, "", "the stream ends between events");
                return None;
            };
            self.text.push_str(std::str::from_utf8(&piece).unwrap());
        }
    }

    async fn event(&mut self, name: &str) -> Value {
        let told = self.next().await.unwrap();
        assert_eq!(told.name, name, "{told:?}");
        told.data
    }

    /// The orders of the snapshot that is next: ids and where they are.
    async fn snapshot(&mut self) -> Vec<(String, String)> {
        let snapshot = self.event("snapshot").await;
        assert!(snapshot["server_time_ms"].is_i64(), "{snapshot}");
        let orders = snapshot["orders"].as_array().unwrap().iter();
        orders
            .map(|order| {
                let status = order["status"].as_str().unwrap();
                (id(order).to_owned(), status.to_owned())
            })
            .collect()
    }

    /// What happens next to an order: this.
    async fn order(&mut self, change: &str, status: &str) -> Value {
        let told = self.event("order").await;
        assert_eq!(
            (&told["change"], &told["order"]["status"]),
            (&json!(change), &json!(status))
        );
        told["order"].clone()
    }

    /// The stream ends, for this reason.
    async fn ends(mut self, reason: &str) {
        loop {
            let told = self.next().await.unwrap();
            if told.name == "end" {
                assert_eq!(told.data, json!({ "reason": reason }));
                assert_eq!(self.next().await, None);
                return;
            }
        }
    }
}

/// A user with a session.
struct User {
    id: Uuid,
    token: String,
    refresh: String,
}

async fn login(app: &App, email: &str) -> Value {
    let body = json!({ "email": email, "password": PASSWORD });
    let login = app.request(Method::POST, "/v1/auth/login").json(&body);
    send(login).await.expect(200).json()
}

impl User {
    async fn new(app: &App, name: &str, role: Role) -> Self {
        let email = format!("{name}@example.org");
        let body = json!({ "email": email, "password": PASSWORD, "name": name });
        let register = app.request(Method::POST, "/v1/auth/register").json(&body);
        let user = send(register).await.expect(201).json();
        sqlx::query("UPDATE users SET role = $2 WHERE email = $1")
            .bind(&email)
            .bind(role.as_str())
            .execute(&mut sql(app).await)
            .await
            .unwrap();
        Self::again(app, id(&user).parse().unwrap(), &email).await
    }

    /// The same user with another session.
    async fn again(app: &App, user: Uuid, email: &str) -> Self {
        let grant = login(app, email).await;
        let text = |name: &str| grant[name].as_str().unwrap().to_owned();
        Self {
            id: user,
            token: text("access_token"),
            refresh: text("refresh_token"),
        }
    }

    fn ask(&self, app: &App, method: Method, path: &str) -> RequestBuilder {
        app.request(method, path).bearer_auth(&self.token)
    }

    async fn ticket(&self, app: &App) -> String {
        let made = send(self.ask(app, Method::POST, TICKETS)).await.expect(201);
        assert_eq!(made.header("cache-control"), Some("no-store"));
        let made = made.json();
        assert_eq!(made["expires_in"], 30);
        made["ticket"].as_str().unwrap().to_owned()
    }

    async fn stream(&self, app: &App) -> Stream {
        Stream::of(self.ask(app, Method::GET, PATH)).await
    }
}

/// What a ticket opens, here or at another node.
fn with_ticket(app: &App, ticket: &str) -> RequestBuilder {
    app.request(Method::GET, &format!("{PATH}?ticket={ticket}"))
}

/// Two nodes, and the cache Redis that they share.
async fn two_nodes() -> (Redis, App, Node) {
    let cache = Redis::start_cache().await;
    let mut app = App::without_node(&[]).await;
    app.cache = Some(cache.address.clone());
    app.run().await;
    let other = app.node().await;
    (cache, app, other)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_buyer_is_told_what_happens_to_its_orders_on_any_node_and_to_nobody_elses() {
    let (_cache, app, other) = two_nodes().await;
    let ada = User::new(&app, "ada", Role::Buyer).await;
    let eve = clock::new_id();
    let terms = json!({
        "allocation": 30, "per_buyer_limit": 30, "hold_seconds": 3_600, "waitlist": true,
    });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let before = app.buy(sale, ada.id, "before", 1).await.expect(201).json();
    // The ticket is of one node, the stream of the other.
    let ticket = ada.ticket(&app).await;
    let mut adas = Stream::of(other.ask(with_ticket(&app, &ticket))).await;
    let mut eves = Stream::to(&app, eve).await;
    let held = |order: &Value| (id(order).to_owned(), "held".to_owned());
    assert_eq!(adas.snapshot().await, [held(&before)]);
    assert_eq!(eves.snapshot().await, []);

    // What is bought at one node is told at the other, in the middle of a crowd.
    let (bought, _) = tokio::join!(
        app.buy(sale, ada.id, "now", 2),
        crowd(strangers(&app, sale, 27))
    );
    let bought = bought.expect(201).json();
    let told = adas.order("accepted", "held").await;
    for name in [
        "id",
        "sale_id",
        "round",
        "quantity",
        "unit_price",
        "total",
        "status",
        "seq",
        "accepted_at",
        "held_until",
    ] {
        assert_eq!(told[name], bought[name], "{name}");
    }
    for name in ["buyer_id", "receipt", "durability"] {
        assert_eq!(told.get(name), None, "{name}");
    }

    // Nothing is left: one waits, the other gives back.
    let path = format!("/v1/sales/{sale}/waitlist");
    let wait = ask(&app, Method::POST, eve, &path).json(&json!({ "quantity": 1 }));
    send(wait).await.expect(200);
    let joined = eves.event("waitlist").await;
    assert_eq!(
        (&joined["change"], &joined["sale_id"]),
        (&json!("joined"), &json!(sale))
    );
    cancel(&app, ada.id, id(&before)).await.expect(200);
    let told = adas.order("cancelled", "cancelled").await;
    assert_eq!((&told["id"], &told["returned"]), (&before["id"], &json!(1)));
    let turn = eves.event("waitlist").await;
    assert_eq!(turn["change"], "offered");
    let offered = eves.order("accepted", "held").await;
    assert_eq!(turn["order_id"], offered["id"]);
    assert!(offered["held_until"].is_string(), "{offered}");

    // Whoever comes back sees what is, whatever was missed.
    drop(adas);
    cancel(&app, ada.id, id(&bought)).await.expect(200);
    let third = app.buy(sale, ada.id, "third", 1).await.expect(201).json();
    let mut adas = ada.stream(&app).await;
    let over = |order: &Value| (id(order).to_owned(), "cancelled".to_owned());
    assert_eq!(
        adas.snapshot().await,
        [held(&third), over(&bought), over(&before)]
    );
    // A second stream of the same buyer sees the same.
    let mut again = ada.stream(&app).await;
    assert_eq!(
        again.snapshot().await,
        [held(&third), over(&bought), over(&before)]
    );
    cancel(&app, ada.id, id(&third)).await.expect(200);
    for stream in [&mut adas, &mut again] {
        assert_eq!(
            stream.order("cancelled", "cancelled").await["id"],
            third["id"]
        );
    }
    // Leaving is told, too. Nothing else has ever been.
    send(ask(&app, Method::DELETE, eve, &path))
        .await
        .expect(204);
    let wait = ask(&app, Method::POST, eve, &path).json(&json!({ "quantity": 1 }));
    refused(&send(wait).await, 409, "conflict");
    cancel(&app, eve, id(&offered)).await.expect(200);
    assert_eq!(
        eves.order("cancelled", "cancelled").await["id"],
        offered["id"]
    );
    other.stop().await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_is_told_of_until_it_ends() {
    let app = App::start_with(&[("STOCKADE_SANDBOX", "on")]).await;
    let terms = json!({ "allocation": 9, "per_buyer_limit": 9, "hold_seconds": 2 });
    let sale = app.sale(terms).await;
    let buyer = clock::new_id();
    let mut stream = Stream::to(&app, buyer).await;
    assert_eq!(stream.snapshot().await, []);
    app.buy(id(&sale), buyer, "k", 1).await.expect(201);
    let held = stream.order("accepted", "held").await;
    let until = DateTime::parse_from_rfc3339(held["held_until"].as_str().unwrap()).unwrap();
    let warned = stream.event("order").await;
    assert_eq!(
        (&warned["change"], &warned["order"]),
        (&json!("expiring"), &held)
    );
    let at = warned["server_time_ms"].as_i64().unwrap();
    assert!(at < until.timestamp_millis() && at >= until.timestamp_millis() - 1_000);
    let expired = stream.order("expired", "expired").await;
    assert_eq!(
        (&expired["id"], &expired["returned"]),
        (&held["id"], &json!(1))
    );
    assert_eq!(expired.get("held_until"), None);

    // What is paid for is confirmed, and what is paid back is refunded.
    let sale = super::payments::sale(&app, 600, json!({})).await;
    let order = app.buy(&sale, buyer, "k", 1).await.expect(201).json();
    stream.order("accepted", "held").await;
    let path = format!("/v1/orders/{}", id(&order));
    let pay = ask(&app, Method::POST, buyer, &format!("{path}/pay"))
        .header("Idempotency-Key", "pay")
        .json(&json!({ "payment_method": "sandbox_ok" }));
    send(pay).await.expect(200);
    stream.order("confirmed", "confirmed").await;
    let refund = app
        .operate(Method::POST, &format!("{path}/refund"))
        .header("Idempotency-Key", "refund")
        .json(&json!({ "quantity": 1 }));
    send(refund).await.expect(200);
    let told = stream.order("refunded", "refunded").await;
    assert_eq!(told["id"], order["id"]);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_opens_one_stream_once_and_soon() {
    let (cache, app, other) = two_nodes().await;
    let ada = User::new(&app, "ada", Role::Buyer).await;
    let bad = async |ticket: &str| {
        for request in [
            with_ticket(&app, ticket),
            other.ask(with_ticket(&app, ticket)),
        ] {
            // A stream, if one began, would not end.
            let answer = send(request.timeout(PATIENCE)).await;
            refused(&answer, 401, "unauthenticated");
            assert_eq!(answer.json()["detail"], "A valid access token is required.");
        }
    };
    let ticket = ada.ticket(&app).await;
    let mut stream = Stream::of(with_ticket(&app, &ticket)).await;
    assert_eq!(stream.snapshot().await, []);
    bad(&ticket).await;
    // Of many who have it one comes in.
    let ticket = ada.ticket(&app).await;
    let asked = (0..20).map(|turn| {
        let request = with_ticket(&app, &ticket);
        let request = if turn % 2 == 0 {
            request
        } else {
            other.ask(request)
        };
        async { request.send().await.unwrap().status().as_u16() }
    });
    let mut statuses = join_all(asked).await;
    statuses.sort_unstable();
    assert_eq!(statuses[0], 200);
    assert!(
        statuses[1..].iter().all(|status| *status == 401),
        "{statuses:?}"
    );

    // It is known for half a minute, by one clock.
    let mut wire = Wire::to(cache.address.expose_secret()).await;
    let late = ada.ticket(&app).await;
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(&late).unwrap();
    let nonce = Uuid::from_slice(&bytes[..16]).unwrap().simple();
    let key = &format!("stockade:ticket:{nonce}");
    let left: u64 = wire.run(&["PTTL", key]).await.parse().unwrap();
    assert!((1..=30_000).contains(&left), "{left}");
    wire.run(&["PEXPIRE", key, "0"]).await;
    bad(&late).await;

    // Nothing else is a ticket: no token, nothing that was changed.
    bad(&ada.token).await;
    bad(&ada.refresh).await;
    bad("").await;
    let fresh = ada.ticket(&app).await;
    let mut changed = fresh.clone().into_bytes();
    changed[40] ^= 1;
    bad(std::str::from_utf8(&changed).unwrap()).await;
    // A token in the address is not even understood, nor is one beside a ticket.
    for (query, pointer) in [
        ("access_token", "#/query/access_token"),
        ("token", "#/query/token"),
    ] {
        let request = app.request(Method::GET, &format!("{PATH}?{query}={}", ada.token));
        let problem = send(request).await.expect(400).json();
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    let both = with_ticket(&app, &fresh).bearer_auth(&ada.token);
    let problem = send(both).await.expect(400).json();
    assert_eq!(problem["errors"][0]["pointer"], "#/query/ticket");
    // All this has not used it up, and a ticket gives nothing but the stream.
    let me = app.request(Method::GET, "/v1/me");
    refused(&send(me.bearer_auth(&fresh)).await, 401, "unauthenticated");
    drop(Stream::of(with_ticket(&app, &fresh)).await);

    // A session takes its tickets with it.
    let last = ada.ticket(&app).await;
    let logout = app
        .request(Method::POST, "/v1/auth/logout")
        .json(&json!({ "refresh_token": ada.refresh }));
    send(logout).await.expect(204);
    refused(
        &send(with_ticket(&app, &last)).await,
        401,
        "unauthenticated",
    );
    refused(
        &send(ada.ask(&app, Method::POST, TICKETS)).await,
        401,
        "unauthenticated",
    );
    stream.ends("logged_out").await;
    other.stop().await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_its_session_on_every_node() {
    let (_cache, app, other) = two_nodes().await;
    let root = User::new(&app, "root", Role::Admin).await;
    let bob = User::new(&app, "bob", Role::Buyer).await;
    let mut lasting = Stream::of(other.ask(bob.ask(&app, Method::GET, PATH))).await;
    assert_eq!(lasting.snapshot().await, []);

    let ada = User::new(&app, "ada", Role::Buyer).await;
    let email = "ada@example.org";
    let there = async |user: &User| Stream::of(other.ask(user.ask(&app, Method::GET, PATH))).await;
    // Logged out; another session of the same user goes on.
    let second = User::again(&app, ada.id, email).await;
    let (first_stream, second_stream) = (there(&ada).await, there(&second).await);
    let body = json!({ "refresh_token": ada.refresh });
    let logout = app.request(Method::POST, "/v1/auth/logout").json(&body);
    send(logout).await.expect(204);
    first_stream.ends("logged_out").await;
    // Another password, asked for with another session.
    let third = User::again(&app, ada.id, email).await;
    let third_stream = there(&third).await;
    let body = json!({ "old_password": PASSWORD, "new_password": format!("{PASSWORD}!") });
    let change = third
        .ask(&app, Method::POST, "/v1/auth/password")
        .json(&body);
    send(change).await.expect(204);
    second_stream.ends("logged_out").await;
    // Everywhere.
    let everywhere = third.ask(&app, Method::POST, "/v1/auth/logout-all");
    send(everywhere).await.expect(204);
    third_stream.ends("logged_out").await;

    // Disabled: also what somebody else has signed.
    let eve = User::new(&app, "eve", Role::Buyer).await;
    let (own, signed) = (there(&eve).await, {
        let token = app.token(eve.id, Role::Buyer);
        Stream::of(other.ask(app.request(Method::GET, PATH).bearer_auth(token))).await
    });
    let disable = root
        .ask(&app, Method::PATCH, &format!("/v1/users/{}", eve.id))
        .json(&json!({ "disabled": true }));
    send(disable).await.expect(200);
    own.ends("logged_out").await;
    signed.ends("logged_out").await;

    // Whoever has nothing to do with it goes on, until the node stops.
    let sale = app.sale(json!({})).await;
    app.buy(id(&sale), bob.id, "k", 1).await.expect(201);
    lasting.order("accepted", "confirmed").await;
    let (stopped, ended) = tokio::join!(other.stop(), lasting.ends("restart"));
    let ((), ()) = (stopped, ended);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_persons_look_and_nobody_at_too_many() {
    let cache = Redis::start_cache().await;
    let mut app = App::without_node(&[("STOCKADE_RATE_LIMIT", "on")]).await;
    app.cache = Some(cache.address.clone());
    app.run().await;
    let ada = User::new(&app, "ada", Role::Buyer).await;
    let body = json!({ "name": "A machine", "scopes": ["read", "buy"] });
    let key = ada.ask(&app, Method::POST, "/v1/me/api-keys").json(&body);
    let key = send(key).await.expect(201).json();
    for (method, path) in [(Method::GET, PATH), (Method::POST, TICKETS)] {
        let machine = app.request(method.clone(), path);
        let machine = machine.bearer_auth(key["key"].as_str().unwrap());
        refused(&send(machine).await, 403, "forbidden");
        refused(
            &send(app.request(method, path)).await,
            401,
            "unauthenticated",
        );
    }
    let mut streams = Vec::new();
    for _ in 0..10 {
        streams.push(ada.stream(&app).await);
    }
    let more = send(ada.ask(&app, Method::GET, PATH)).await;
    refused(&more, 429, "rate_limited");
    assert!(more.header("retry-after").is_some());
    // One that ends makes room.
    streams.pop();
    let room = async {
        while send_head(ada.ask(&app, Method::GET, PATH)).await != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, room).await.unwrap();
    drop(streams);
    app.finish().await;
}

/// The status of an answer that may never end.
async fn send_head(request: RequestBuilder) -> u16 {
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_cache_redis_there_are_no_tickets_and_everything_else() {
    let (cache, app, other) = two_nodes().await;
    let ada = User::new(&app, "ada", Role::Buyer).await;
    let sale = app.sale(json!({})).await;
    let ticket = ada.ticket(&app).await;
    cache.server.signal(Signal::STOP);
    let none = send(ada.ask(&app, Method::POST, TICKETS)).await;
    refused(&none, 503, "unavailable");
    assert_eq!(none.json()["outcome"], "not_applied");
    assert!(none.header("retry-after").is_some());
    refused(
        &send(other.ask(with_ticket(&app, &ticket))).await,
        503,
        "unavailable",
    );
    // What is no ticket is none without a question.
    refused(&send(with_ticket(&app, "x")).await, 401, "unauthenticated");
    let mut stream = ada.stream(&app).await;
    assert_eq!(stream.snapshot().await, []);
    app.buy(id(&sale), ada.id, "k", 1).await.expect(201);
    stream.order("accepted", "confirmed").await;
    cache.server.signal(Signal::CONT);
    let back = async {
        while send(ada.ask(&app, Method::POST, TICKETS)).await.status != 201 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, back).await.unwrap();
    other.stop().await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_tells_the_truth_again_after_redis_was_made_anew() {
    let app = App::start().await;
    let other = app.node().await;
    let terms = json!({ "allocation": 50, "per_buyer_limit": 50, "hold_seconds": 3_600 });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let buyer = clock::new_id();
    let mut stream = Stream::of(other.ask(ask(&app, Method::GET, buyer, PATH))).await;
    assert_eq!(stream.snapshot().await, []);
    let first = app.buy(sale, buyer, "first", 1).await.expect(201).json();
    stream.order("accepted", "held").await;
    app.audit(sale).await;

    assert_eq!(
        Wire::connect(&app.redis).await.run(&["FLUSHALL"]).await,
        "OK"
    );
    let doors = [app.door()];
    let body = json!({ "quantity": 1 }).to_string();
    let second = insist(app.purchase(sale, buyer, "second", body), &doors).await;
    let second = second.expect(201).json();
    let path = format!("/v1/orders/{}/cancel", id(&first));
    insist(ask(&app, Method::POST, buyer, &path), &doors)
        .await
        .expect(200);
    // In the end it is so, by whatever way it was told.
    let mut known = BTreeMap::new();
    let truth = [(id(&first), "cancelled"), (id(&second), "held")];
    let truth = truth.map(|(id, status)| (id.to_owned(), json!(status)));
    let truth: BTreeMap<_, _> = truth.into_iter().collect();
    while known != truth {
        let told = stream.next().await.unwrap();
        let orders = match told.name.as_str() {
            "snapshot" => {
                known.clear();
                told.data["orders"].as_array().unwrap().clone()
            }
            "order" => vec![told.data["order"].clone()],
            _ => panic!("{told:?}"),
        };
        for order in orders {
            known.insert(id(&order).to_owned(), order["status"].clone());
        }
    }
    other.stop().await;
    app.finish().await;
}

/// Milliseconds of CPU that a process has used.
fn cpu_ms(process: &str) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    let ticks = |at: usize| fields[at].parse::<u64>().unwrap();
    // A hundred ticks a second on every Linux.
    (ticks(11) + ticks(12)) * 10
}

/// What was counted until now: scripts that Redis ran, reads of the journal, looks into PostgreSQL.
async fn counted(app: &App, wire: &mut Wire) -> [u64; 3] {
    let stats = wire.ask(&["INFO", "commandstats"]).await.concat();
    let calls = stats.split("cmdstat_evalsha:calls=").nth(1).unwrap();
    let metrics = app.get("/metrics").await.text;
    let metric = |name: &str| {
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap().to_owned()
    };
    [
        calls.split(',').next().unwrap().to_owned(),
        metric("stockade_realtime_own_reads_total"),
        metric("stockade_realtime_own_lookups_total"),
    ]
    .map(|number| number.parse().unwrap())
}

/// `STOCKADE_TEST_STREAMS=1000 cargo test --test it own_events::many -- --nocapture` for
/// the numbers of ADR 0024.
#[tokio::test(flavor = "multi_thread")]
async fn many_streams_are_one_reader_and_a_few_queries() {
    let streams = variable("STOCKADE_TEST_STREAMS").unwrap_or(100);
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 100_000, "per_buyer_limit": 5 }))
        .await;
    let mut wire = Wire::connect(&app.redis).await;
    let redis = wire.ask(&["INFO", "server"]).await.concat();
    let redis = redis.split("process_id:").nth(1).unwrap();
    let redis = redis.lines().next().unwrap().trim().to_owned();
    let buyers: Vec<_> = (0..streams).map(|_| clock::new_id()).collect();
    let strangers = 20 * streams;
    // The same sale twice: with nobody who looks, and with all of them.
    let mut open: Vec<Stream> = Vec::new();
    for round in ["nobody looks", "everybody looks"] {
        let before = counted(&app, &mut wire).await;
        if round == "everybody looks" {
            let began = Instant::now();
            open = join_all(buyers.iter().map(|buyer| Stream::to(&app, *buyer))).await;
            for stream in &mut open {
                assert_eq!(stream.snapshot().await.len(), 1);
            }
            let [_, _, lookups] = counted(&app, &mut wire).await;
            println!(
                "{streams} streams open in {:?}, {lookups} looks into PostgreSQL",
                began.elapsed()
            );
            assert!(lookups < streams / 2, "{lookups}");
        }
        let (own, theirs) = (cpu_ms("self"), cpu_ms(&redis));
        let began = Instant::now();
        let mut bought = Vec::new();
        let mut mine = buyers.iter();
        for chunk in 0..strangers / 100 {
            let others = (0..100).map(|_| clock::new_id());
            let some: Vec<_> = mine.by_ref().take(5).copied().chain(others).collect();
            let key = &round[..4];
            let buying = some.iter().map(|buyer| app.buy(id(&sale), *buyer, key, 1));
            for (answer, buyer) in join_all(buying).await.into_iter().zip(some) {
                bought.push((buyer, id(&answer.expect(201).json()).to_owned()));
            }
            let at = Duration::from_millis(200) * u32::try_from(chunk + 1).unwrap();
            tokio::time::sleep(at.saturating_sub(began.elapsed())).await;
        }
        for (stream, buyer) in open.iter_mut().zip(&buyers) {
            let told = stream.order("accepted", "confirmed").await;
            let (_, own) = bought.iter().find(|(owner, _)| owner == buyer).unwrap();
            assert_eq!(told["id"], *own);
        }
        let took = began.elapsed();
        let after = counted(&app, &mut wire).await;
        let [scripts, reads, lookups] = [0, 1, 2].map(|at| after[at] - before[at]);
        println!(
            "{round}: {} orders in {took:?}: {scripts} scripts, of these {reads} reads of the journal, \
             {lookups} looks into PostgreSQL; CPU {} ms (clients included), Redis {} ms",
            bought.len(),
            cpu_ms("self") - own,
            cpu_ms(&redis) - theirs,
        );
        app.audit(id(&sale)).await;
    }
    for stream in &mut open {
        assert_eq!(stream.text, "", "nothing but one's own was told");
    }
    drop(open);
    app.until("/metrics", |answer| {
        answer
            .text
            .contains("stockade_realtime_own_subscribers 0\n")
    })
    .await;
    app.finish().await;
}
