//! Selling over the real router, a real Redis and a real PostgreSQL.
#![expect(
    clippy::unwrap_used,
    reason = "a test says what went wrong by panicking"
)]

mod support;

use std::{
    collections::HashMap, fs, num::NonZeroUsize, os::unix::fs::PermissionsExt, sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Request},
};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use stockade::{
    auth::{
        Role,
        accounts::Accounts,
        password::PasswordHasher,
        session::Successors,
        token::{Identity, Secret, TokenKeys},
    },
    clock,
    domain::id::{JournalId, Partition},
    embedded::{PostgresOptions, PostgresServer},
    engine::{Engine, EngineMeter, EngineOptions, Engines, RedisUrl},
    http::{AccessLog, HttpSettings, HttpState, Listener, Parts, router},
    metrics::Metrics,
    ops::recovery::{Recovery, Verified},
    readiness::Readiness,
    sales::{Pseudonyms, Shop},
    store::{
        Database, DatabaseSettings,
        directory::Directory,
        journal::{Ledger, Positions},
        orders::Orders,
        products::Products,
        rounds::Rounds,
        sales::Sales,
        sessions::Sessions,
        users::Users,
    },
    writer::{StoredPosition, Writer},
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use uuid::Uuid;

const SECRET: &[u8] = b"a secret of the tests, 32 bytes!";

/// The router on services of its own, with a writer behind it.
struct App {
    router: Router,
    tokens: Arc<TokenKeys>,
    product: String,
    engines: Engines,
    stored: StoredPosition,
    stop: CancellationToken,
    redis: support::Redis,
    _postgres: PostgresServer,
    _dir: TempDir,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    text: String,
    body: Value,
}

impl Drop for App {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl App {
    async fn start() -> Self {
        // PostgreSQL runs as another user when we are root, and has to pass through.
        let open = fs::Permissions::from_mode(0o711);
        let dir = tempfile::Builder::new()
            .permissions(open)
            .tempdir()
            .unwrap();
        let options = PostgresOptions {
            throwaway: true,
            ..PostgresOptions::new(dir.path().join("postgres"))
        };
        let (postgres, redis) =
            tokio::join!(PostgresServer::start(options), support::Redis::start());
        let postgres = postgres.unwrap();
        let database =
            Database::new(postgres.url().expose_secret(), DatabaseSettings::default()).unwrap();
        database.migrate().await.unwrap();

        let options = EngineOptions {
            url: RedisUrl(redis.url.clone().into()),
            queue_capacity: 1024,
        };
        let engine = Engine::connect(&options, Partition(0), EngineMeter::default())
            .await
            .unwrap();
        let reader = engine.journal_reader().await.unwrap();
        let engines = Engines::new(vec![engine]);
        let positions = Positions::new(database.clone());
        let rounds = Rounds::new(database.clone());
        let recovery = Recovery {
            engines: engines.clone(),
            positions: positions.clone(),
            rounds: rounds.clone(),
        };
        let verified = recovery.verify(&engines.all()[0]).await.unwrap();
        assert!(matches!(verified, Verified::Begun(_)));
        let stop = CancellationToken::new();
        let writer = Writer::new(Ledger::new(&database, Partition(0)), reader);
        let stored = writer.stored();
        tokio::spawn(writer.run(stop.clone(), stop.clone()));

        let shop = Shop {
            engines: engines.clone(),
            directory: Directory::new(database.clone()),
            sales: Sales::new(database.clone()),
            rounds,
            orders: Orders::new(database.clone()),
            positions,
            stored: HashMap::from([(Partition(0), stored.clone())]),
            pseudonyms: Pseudonyms::new(SECRET).unwrap(),
        };
        let metrics = Arc::new(Metrics::new());
        let secret = Secret {
            id: "1",
            bytes: SECRET,
        };
        let tokens = Arc::new(TokenKeys::new(&[secret], 600).unwrap());
        let passwords =
            PasswordHasher::new(4, NonZeroUsize::MIN, 64, metrics.passwords.clone()).unwrap();
        let accounts = Accounts {
            users: Users::new(database.clone()),
            sessions: Sessions::new(database.clone()),
            passwords,
            tokens: Arc::clone(&tokens),
            successors: Arc::new(Successors::new(SECRET).unwrap()),
        };
        let state = HttpState::new(Parts {
            tokens: Arc::clone(&tokens),
            accounts,
            products: Products::new(database),
            shop: Arc::new(shop),
            metrics,
            readiness: Readiness::new(&[]),
        });
        let settings = HttpSettings {
            cors_origins: Vec::new(),
            request_timeout: Duration::from_secs(30),
            access_log: AccessLog::off(),
        };
        let mut app = Self {
            router: router(state, &settings, Listener::All),
            tokens,
            product: String::new(),
            engines,
            stored,
            stop,
            redis,
            _postgres: postgres,
            _dir: dir,
        };
        let lamp = json!({"name": "Lamp", "description": "", "price": {"amount": 1999, "currency": "EUR"}});
        let product = app.operate("POST", "/v1/products", lamp, "").await;
        product.is(201).text("id").clone_into(&mut app.product);
        app
    }

    /// As `user`; a body of null is none, an empty key is none.
    async fn send(
        &self,
        (user, role): (u128, Role),
        method: &str,
        uri: &str,
        body: Value,
        key: &str,
    ) -> Answer {
        let identity = Identity {
            user: Uuid::from_u128(user),
            role,
            session: None,
        };
        let token = self
            .tokens
            .mint(identity, clock::new_id(), clock::now())
            .unwrap();
        let mut request = Request::builder()
            .method(method)
            .uri(uri)
            .header("authorization", format!("Bearer {token}"));
        if !key.is_empty() {
            request = request.header("idempotency-key", key);
        }
        let body = if body.is_null() {
            Body::empty()
        } else {
            request = request.header("content-type", "application/json");
            Body::from(body.to_string())
        };
        answer(self.router.clone(), request.body(body).unwrap()).await
    }

    async fn operate(&self, method: &str, uri: &str, body: Value, key: &str) -> Answer {
        self.send((1, Role::Operator), method, uri, body, key).await
    }

    async fn buy(&self, sale: &str, user: u128, quantity: u64, key: &str) -> Answer {
        let body = json!({ "quantity": quantity });
        let uri = format!("/v1/sales/{sale}/orders");
        self.send((user, Role::Buyer), "POST", &uri, body, key)
            .await
    }

    async fn get(&self, uri: &str) -> Answer {
        let request = Request::get(uri).body(Body::empty()).unwrap();
        answer(self.router.clone(), request).await
    }

    /// A sale of `allocation` units, two for each buyer, that has begun.
    async fn sale(&self, allocation: u64) -> String {
        let body = json!({"product_id": self.product, "allocation": allocation,
                          "per_buyer_limit": 2, "opens_at": "2020-01-01T00:00:00Z"});
        let sale = self.operate("POST", "/v1/sales", body, "").await;
        sale.is(201).text("id").to_owned()
    }

    /// Waits until PostgreSQL has all that was journaled so far.
    async fn drained(&self) {
        let pseq = self.engines.all()[0].floor();
        let id = JournalId {
            pseq,
            ..self.stored.get()
        };
        assert!(self.stored.clone().reached(id).await);
    }
}

async fn answer(router: Router, request: Request<Body>) -> Answer {
    let (parts, body) = router.oneshot(request).await.unwrap().into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    Answer {
        status: parts.status.as_u16(),
        headers: parts.headers,
        body: serde_json::from_str(&text).unwrap_or(Value::Null),
        text,
    }
}

impl Answer {
    fn is(&self, status: u16) -> &Self {
        assert_eq!(self.status, status, "{}", self.text);
        self
    }

    fn refuses(&self, status: u16, code: &str, retry: &str) -> &Self {
        self.is(status);
        assert_eq!(
            (
                &self.body["code"],
                &self.body["retry"],
                &self.body["outcome"]
            ),
            (&code.into(), &retry.into(), &"not_applied".into()),
            "{}",
            self.text
        );
        self
    }

    /// Asserts these members.
    fn has(&self, members: &Value) -> &Self {
        for (name, value) in members.as_object().unwrap() {
            assert_eq!(&self.body[name], value, "{name} in {}", self.text);
        }
        self
    }

    fn text(&self, member: &str) -> &str {
        self.body[member].as_str().unwrap()
    }

    fn replayed(&self) -> bool {
        self.headers
            .get("idempotency-replayed")
            .is_some_and(|value| value == "true")
    }
}

#[tokio::test]
async fn a_sale_sells_out_and_answers_every_retry_alike() {
    let app = App::start().await;
    let sale = app.sale(3).await;
    let first = app.buy(&sale, 10, 2, "a").await;
    first.is(201).has(&json!({
        "sale_id": sale, "round": 1, "buyer_id": Uuid::from_u128(10), "quantity": 2,
        "unit_price": {"amount": 1999, "currency": "EUR"},
        "total": {"amount": 3998, "currency": "EUR"},
        "status": "confirmed", "seq": 1, "durability": "fsync",
    }));
    assert_eq!(first.body.as_object().unwrap().len(), 11);
    let order = first.text("id").to_owned();
    assert_eq!(first.headers["location"], format!("/v1/orders/{order}"));
    assert_eq!(first.headers["cache-control"], "no-store");
    assert!(!first.replayed());
    let accepted_at = first.text("accepted_at");
    assert!(accepted_at.len() == 24 && accepted_at.ends_with('Z'));

    app.buy(&sale, 10, 1, "b")
        .await
        .refuses(409, "buyer_limit", "never")
        .has(&json!({"limit": 2, "held": 2}));
    app.buy(&sale, 11, 3, "a")
        .await
        .refuses(422, "order_limit", "never")
        .has(&json!({"limit": 2, "held": 0}));
    app.buy(&sale, 11, 2, "a")
        .await
        .refuses(409, "insufficient", "never")
        .has(&json!({"remaining": 1}));
    app.buy(&sale, 10, 1, "a")
        .await
        .refuses(422, "idempotency_key_mismatch", "never");
    app.buy(&sale, 11, 1, "b")
        .await
        .is(201)
        .has(&json!({"seq": 2}));
    app.buy(&sale, 12, 1, "a")
        .await
        .is(409)
        .has(&json!({"code": "sold_out"}));
    app.get(&format!("/v1/sales/{sale}")).await.is(200).has(&json!({
        "name": "Lamp", "terms": null, "state": "open", "sold_out": true, "round": 1,
        "allocation": 3, "remaining": 0, "held": 0, "sold": 3, "seq": 2, "per_buyer_limit": 2,
        "per_order_limit": 2, "opens_at": "2020-01-01T00:00:00.000Z", "closes_at": null,
        "price": {"amount": 1999, "currency": "EUR"}, "payment": "none", "durability": "default",
    }));

    let uri = format!("/v1/orders/{order}/cancel");
    let stranger = app
        .send((11, Role::Buyer), "POST", &uri, Value::Null, "")
        .await;
    stranger.refuses(404, "not_found", "never");
    for _ in 0..2 {
        let cancelled = app
            .send((10, Role::Buyer), "POST", &uri, Value::Null, "")
            .await;
        cancelled
            .is(200)
            .has(&json!({"id": order, "status": "cancelled", "seq": 1}));
    }
    let again = app.buy(&sale, 10, 2, "a").await;
    assert!(again.is(201).replayed());
    assert_eq!(again.text, first.text);
    app.operate("POST", &format!("/v1/sales/{sale}/close"), Value::Null, "")
        .await
        .is(200)
        .has(&json!({"state": "closed", "remaining": 2}));
    let again = app.buy(&sale, 10, 2, "a").await;
    assert!(again.is(201).replayed());
    assert_eq!(again.text, first.text);
    app.buy(&sale, 12, 1, "a")
        .await
        .is(409)
        .has(&json!({"code": "closed"}));
    app.operate("POST", &format!("/v1/sales/{sale}/resume"), Value::Null, "")
        .await
        .refuses(409, "conflict", "never");
}

#[tokio::test]
async fn a_sale_is_made_once_and_runs_as_its_operator_says() {
    let app = App::start().await;
    let opens_at = clock::now() + chrono::Duration::hours(1);
    let body = json!({"product_id": app.product, "name": "Friday", "terms": "No returns.",
        "price": {"amount": 500, "currency": "USD"}, "allocation": 5, "per_buyer_limit": 4,
        "per_order_limit": 3, "opens_at": opens_at.to_rfc3339()});
    let made = app.operate("POST", "/v1/sales", body.clone(), "k").await;
    made.is(201).has(&json!({
        "name": "Friday", "terms": "No returns.", "price": {"amount": 500, "currency": "USD"},
        "state": "scheduled", "sold_out": false, "remaining": 5, "per_order_limit": 3,
    }));
    let id = made.text("id").to_owned();
    assert_eq!(made.headers["location"], format!("/v1/sales/{id}"));
    let again = app.operate("POST", "/v1/sales", body.clone(), "k").await;
    assert!(!made.replayed() && again.is(201).replayed());
    assert_eq!(again.text("id"), id);
    let mut other = body.clone();
    other["allocation"] = 6.into();
    app.operate("POST", "/v1/sales", other.clone(), "k")
        .await
        .refuses(422, "idempotency_key_mismatch", "never");
    other["product_id"] = id.clone().into();
    let missing = app.operate("POST", "/v1/sales", other, "").await;
    missing.refuses(422, "validation", "never");
    assert_eq!(missing.body["errors"][0]["pointer"], "#/product_id");

    let early = app.buy(&id, 10, 1, "a").await;
    early.refuses(409, "not_open", "after");
    assert_eq!(early.text("opens_at"), made.text("opens_at"));
    let starts_in_ms = early.body["starts_in_ms"].as_u64().unwrap();
    let wait = starts_in_ms.div_ceil(1000).to_string();
    assert_eq!(early.headers["retry-after"], wait.as_str());
    assert!((3_500_000..=3_600_000).contains(&starts_in_ms));

    let sale = app.sale(2).await;
    let at = |act: &str| format!("/v1/sales/{sale}/{act}");
    for _ in 0..2 {
        let paused = app.operate("POST", &at("pause"), json!({}), "").await;
        paused.is(200).has(&json!({"state": "paused", "seq": 1}));
    }
    let refused = app.buy(&sale, 10, 1, "a").await;
    assert_eq!(
        refused.refuses(409, "paused", "after").headers["retry-after"],
        "1"
    );
    let resumed = app.operate("POST", &at("resume"), Value::Null, "").await;
    resumed.is(200).has(&json!({"state": "open", "seq": 2}));

    for (units, key, status, code) in [
        (0, "r", 422, "validation"),
        (10_000_000, "r", 422, "validation"),
        (1, "", 400, "idempotency_key_missing"),
    ] {
        let refused = app
            .operate("POST", &at("restock"), json!({"units": units}), key)
            .await;
        refused.refuses(status, code, "never");
    }
    for replayed in [false, true] {
        let restocked = app
            .operate("POST", &at("restock"), json!({"units": 3}), "r")
            .await;
        restocked
            .is(200)
            .has(&json!({"allocation": 5, "remaining": 5, "seq": 3}));
        assert_eq!(restocked.replayed(), replayed);
    }
    app.operate("POST", &at("restock"), json!({"units": 4}), "r")
        .await
        .refuses(422, "idempotency_key_mismatch", "never");

    app.drained().await;
    let list = async |query: &str| {
        let page = app.get(&format!("/v1/sales{query}")).await;
        let ids: Vec<_> = page.is(200).body["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|sale| sale["id"].as_str().unwrap().to_owned())
            .collect();
        (ids, page.body["next_cursor"].as_str().map(str::to_owned))
    };
    assert_eq!(list("").await.0, [sale.clone(), id.clone()]);
    assert_eq!(list("?state=scheduled").await.0, std::slice::from_ref(&id));
    assert_eq!(list("?state=open").await.0, std::slice::from_ref(&sale));
    assert!(list("?state=closed").await.0.is_empty());
    let (page, cursor) = list("?limit=1").await;
    assert_eq!(page, std::slice::from_ref(&sale));
    let cursor = cursor.unwrap();
    assert_eq!(
        list(&format!("?limit=1&cursor={cursor}")).await,
        (vec![id], None)
    );
    app.get("/v1/sales?state=late")
        .await
        .refuses(400, "validation", "never");
    for bad in [
        Uuid::nil().to_string(),
        "%7Bp0%7D".to_owned(),
        "1".to_owned(),
    ] {
        app.get(&format!("/v1/sales/{bad}"))
            .await
            .refuses(404, "not_found", "never");
        app.get(&format!("/v1/sales/{bad}/leaderboard"))
            .await
            .refuses(404, "not_found", "never");
        app.buy(&bad, 10, 1, "a")
            .await
            .refuses(404, "not_found", "never");
        let order = app
            .operate("GET", &format!("/v1/orders/{bad}"), Value::Null, "")
            .await;
        order.refuses(404, "not_found", "never");
    }
}

#[tokio::test]
async fn orders_are_seen_by_their_buyers_and_by_operators_only() {
    let app = App::start().await;
    let sale = app.sale(10).await;
    let mut orders = Vec::new();
    for (user, key) in [(10, "a"), (11, "a"), (10, "b")] {
        orders.push(
            app.buy(&sale, user, 1, key)
                .await
                .is(201)
                .text("id")
                .to_owned(),
        );
    }
    let uri = format!("/v1/orders/{}", orders[0]);
    let own = app
        .send((10, Role::Buyer), "GET", &uri, Value::Null, "")
        .await;
    own.is(200)
        .has(&json!({"id": orders[0], "status": "confirmed", "quantity": 1}));
    assert!(own.body["stored"].is_boolean());
    app.operate("GET", &uri, Value::Null, "").await.is(200);
    let stranger = app
        .send((11, Role::Buyer), "GET", &uri, Value::Null, "")
        .await;
    stranger.refuses(404, "not_found", "never");
    app.drained().await;
    let own = app
        .send((10, Role::Buyer), "GET", &uri, Value::Null, "")
        .await;
    own.has(&json!({"stored": true}));

    let list = async |who: (u128, Role), query: &str| {
        let page = app
            .send(who, "GET", &format!("/v1/orders{query}"), Value::Null, "")
            .await;
        let ids: Vec<_> = page.is(200).body["data"]
            .as_array()
            .unwrap()
            .iter()
            .inspect(|order| assert_eq!(order["stored"], true))
            .map(|order| order["id"].as_str().unwrap().to_owned())
            .collect();
        (ids, page.body["next_cursor"].as_str().map(str::to_owned))
    };
    let (buyer, operator) = ((10, Role::Buyer), (1, Role::Operator));
    let mine = vec![orders[2].clone(), orders[0].clone()];
    let mut sorted = list(buyer, "").await.0;
    // Two within one millisecond stand in the order of their ids.
    assert_eq!(sorted.len(), 2);
    sorted.sort_unstable();
    let mut expected = mine.clone();
    expected.sort_unstable();
    assert_eq!(sorted, expected);
    let all: Vec<_> = orders.iter().rev().cloned().collect();
    assert_eq!(list(operator, "").await.0, all);
    assert_eq!(list(operator, &format!("?sale_id={sale}")).await.0, all);
    let other = Uuid::from_u128(11);
    assert_eq!(
        list(operator, &format!("?buyer_id={other}")).await.0,
        orders[1..2]
    );
    assert!(list(operator, "?status=cancelled").await.0.is_empty());
    let (page, cursor) = list(operator, "?limit=2").await;
    assert_eq!(page, all[..2]);
    let next = format!("?limit=2&cursor={}", cursor.unwrap());
    assert_eq!(list(operator, &next).await, (vec![all[2].clone()], None));
    let uri = format!("/v1/orders?buyer_id={other}");
    let refused = app.send(buyer, "GET", &uri, Value::Null, "").await;
    refused.refuses(403, "forbidden", "never");
    let refused = app
        .send(buyer, "GET", "/v1/orders?status=lost", Value::Null, "")
        .await;
    refused.refuses(400, "validation", "never");
}

#[tokio::test]
async fn the_leaderboard_is_in_order_of_purchase_and_names_nobody() {
    let app = App::start().await;
    let sale = app.sale(10).await;
    let mut orders = Vec::new();
    for user in 10..15 {
        orders.push(
            app.buy(&sale, user, 1, "a")
                .await
                .is(201)
                .text("id")
                .to_owned(),
        );
    }
    let uri = format!("/v1/orders/{}/cancel", orders[1]);
    app.operate("POST", &uri, Value::Null, "").await.is(200);
    let uri = format!("/v1/sales/{sale}/leaderboard");
    let mut entries = Vec::new();
    let mut next = "?limit=2".to_owned();
    loop {
        let page = app.get(&format!("{uri}{next}")).await;
        entries.extend(page.is(200).body["data"].as_array().unwrap().clone());
        let Some(cursor) = page.body["next_cursor"].as_str() else {
            break;
        };
        next = format!("?limit=2&cursor={cursor}");
        app.get(&format!("{uri}{next}&round=2"))
            .await
            .refuses(400, "validation", "never");
    }
    let places: Vec<_> = entries
        .iter()
        .map(|entry| {
            (
                entry["rank"].as_u64().unwrap(),
                entry["seq"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(places, [(1, 1), (2, 3), (3, 4), (4, 5)]);
    for entry in &entries {
        assert_eq!(entry["buyer"].as_str().unwrap().len(), 16);
        assert_eq!(entry.as_object().unwrap().len(), 5);
    }
    app.get(&format!("{uri}?round=1")).await.is(200);
    for round in ["0", "2"] {
        let refused = app.get(&format!("{uri}?round={round}")).await;
        refused.refuses(404, "not_found", "never");
    }
}

#[tokio::test]
async fn the_catalogue_shows_stock_while_it_moves_and_never_hides_behind_a_cache() {
    let app = App::start().await;
    let uri = format!("/v1/products/{}", app.product);
    let get = async |etag: &str| {
        let request = Request::get(&uri).header("if-none-match", etag);
        answer(app.router.clone(), request.body(Body::empty()).unwrap()).await
    };
    let nothing = json!({"sale_id": null, "stock": null});
    let before = app.get(&uri).await;
    before.is(200).has(&nothing);
    assert_eq!(before.headers["etag"], "\"1\"");
    get("\"1\"").await.is(304);

    let sale = app.sale(3).await;
    app.buy(&sale, 10, 1, "a").await.is(201);
    let live = get("\"1\"").await;
    live.is(200).has(&json!({"sale_id": sale, "stock": 2}));
    let etag = live.headers["etag"].to_str().unwrap().to_owned();
    get(&etag).await.is(200);
    let list = app.get("/v1/products").await;
    assert_eq!(list.is(200).body["data"][0]["stock"], 2);

    app.operate("POST", &format!("/v1/sales/{sale}/close"), Value::Null, "")
        .await
        .is(200);
    get(&etag).await.is(200).has(&nothing);
    get("\"1\"").await.is(304);
}

#[tokio::test]
async fn without_redis_nothing_is_sold_and_the_catalogue_stays() {
    let mut app = App::start().await;
    let sale = app.sale(3).await;
    app.buy(&sale, 10, 1, "a").await.is(201);
    app.drained().await;
    app.redis.stop();
    for (method, uri, body) in [
        (
            "POST",
            format!("/v1/sales/{sale}/orders"),
            json!({"quantity": 1}),
        ),
        ("GET", format!("/v1/sales/{sale}"), Value::Null),
        ("GET", "/v1/sales".to_owned(), Value::Null),
        ("POST", format!("/v1/sales/{sale}/pause"), Value::Null),
    ] {
        let refused = app.operate(method, &uri, body, "k").await;
        refused
            .is(503)
            .has(&json!({"code": "unavailable", "retry": "after"}));
        assert!(refused.headers.contains_key("retry-after"));
    }
    let list = app.get("/v1/products").await;
    let product = &list.is(200).body["data"][0];
    assert_eq!(
        (&product["sale_id"], &product["stock"]),
        (&Value::Null, &Value::Null)
    );
    let orders = app.operate("GET", "/v1/orders", Value::Null, "").await;
    assert_eq!(orders.is(200).body["data"].as_array().unwrap().len(), 1);
}
