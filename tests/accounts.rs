//! Accounts and the catalogue over the real router and a real PostgreSQL.
#![expect(
    clippy::unwrap_used,
    reason = "a test says what went wrong by panicking"
)]

use std::{
    collections::HashMap, fs, num::NonZeroUsize, os::unix::fs::PermissionsExt, sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode},
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
    embedded::{PostgresOptions, PostgresServer},
    engine::Engines,
    http::{AccessLog, HttpSettings, HttpState, Listener, Parts, router},
    metrics::Metrics,
    readiness::Readiness,
    sales::{Pseudonyms, Shop},
    store::{
        Database, DatabaseSettings, directory::Directory, journal::Positions, orders::Orders,
        products::Products, rounds::Rounds, sales::Sales, sessions::Sessions, users::Users,
    },
};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tower::ServiceExt;
use uuid::Uuid;

const SECRET: &[u8] = b"a secret of the tests, 32 bytes!";

/// The router on a database of its own.
struct App {
    router: Router,
    operator: String,
    _postgres: PostgresServer,
    _dir: TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
}

/// A shop whose engines are away.
fn closed_shop(database: Database) -> Shop {
    Shop {
        engines: Engines::new(Vec::new()),
        directory: Directory::new(database.clone()),
        sales: Sales::new(database.clone()),
        rounds: Rounds::new(database.clone()),
        orders: Orders::new(database.clone()),
        positions: Positions::new(database),
        stored: HashMap::new(),
        pseudonyms: Pseudonyms::new(SECRET).unwrap(),
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
        let postgres = PostgresServer::start(options).await.unwrap();
        let database =
            Database::new(postgres.url().expose_secret(), DatabaseSettings::default()).unwrap();
        assert!(!database.migrated().await.unwrap());
        database.migrate().await.unwrap();
        assert!(database.migrated().await.unwrap());

        let metrics = Arc::new(Metrics::new());
        let tokens = Arc::new(
            TokenKeys::new(
                &[Secret {
                    id: "1",
                    bytes: SECRET,
                }],
                600,
            )
            .unwrap(),
        );
        let passwords =
            PasswordHasher::new(4, NonZeroUsize::MIN, 64, metrics.passwords.clone()).unwrap();
        let accounts = Accounts {
            users: Users::new(database.clone()),
            sessions: Sessions::new(database.clone()),
            passwords,
            tokens: Arc::clone(&tokens),
            successors: Arc::new(Successors::new(SECRET).unwrap()),
        };
        let identity = Identity {
            user: Uuid::from_u128(1),
            role: Role::Operator,
            session: None,
        };
        let operator = tokens
            .mint(identity, clock::new_id(), clock::now())
            .unwrap();
        let state = HttpState::new(Parts {
            tokens,
            accounts,
            products: Products::new(database.clone()),
            shop: Arc::new(closed_shop(database)),
            metrics,
            readiness: Readiness::new(&[]),
        });
        let settings = HttpSettings {
            cors_origins: Vec::new(),
            request_timeout: Duration::from_secs(30),
            access_log: AccessLog::off(),
        };
        let router = router(state, &settings, Listener::All);
        Self {
            router,
            operator,
            _postgres: postgres,
            _dir: dir,
        }
    }

    async fn send(
        &self,
        method: Method,
        uri: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = match body {
            Some(body) => {
                request = request.header("content-type", "application/json");
                Body::from(body.to_string())
            }
            None => Body::empty(),
        };
        answer(self.router.clone(), request.body(body).unwrap()).await
    }

    async fn post(&self, uri: &str, body: Value) -> Answer {
        self.send(Method::POST, uri, Some(body), &[]).await
    }

    async fn get(&self, uri: &str) -> Answer {
        self.send(Method::GET, uri, None, &[]).await
    }

    /// As an operator, with one more header.
    async fn operate(
        &self,
        method: Method,
        uri: &str,
        body: Option<Value>,
        header: (&str, &str),
    ) -> Answer {
        let bearer = format!("Bearer {}", self.operator);
        self.send(method, uri, body, &[("authorization", &bearer), header])
            .await
    }

    async fn refresh(&self, token: &str) -> Answer {
        self.post("/v1/auth/refresh", json!({"refresh_token": token}))
            .await
    }

    async fn login(&self, email: &str, password: &str) -> Answer {
        self.post(
            "/v1/auth/login",
            json!({"email": email, "password": password}),
        )
        .await
    }
}

async fn answer(router: Router, request: Request<Body>) -> Answer {
    let (parts, body) = router.oneshot(request).await.unwrap().into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    Answer {
        status: parts.status,
        headers: parts.headers,
        body,
    }
}

impl Answer {
    fn refuses(&self, status: u16, code: &str) {
        assert_eq!(
            (self.status.as_u16(), &self.body["code"]),
            (status, &code.into()),
            "{}",
            self.body
        );
        assert_eq!(self.body["outcome"], "not_applied");
    }

    fn text(&self, member: &str) -> &str {
        self.body[member].as_str().unwrap()
    }
}

#[tokio::test]
async fn a_user_registers_logs_in_stays_and_leaves() {
    let app = App::start().await;
    let ada =
        json!({"email": " Ada@Example.org", "password": "correct horse battery", "name": "Ada"});
    let user = app.post("/v1/auth/register", ada.clone()).await;
    assert_eq!(user.status, StatusCode::CREATED);
    assert_eq!(
        (user.text("email"), user.text("role")),
        ("ada@example.org", "buyer")
    );
    app.post("/api/auth/register", ada)
        .await
        .refuses(409, "email_taken");

    let [wrong, unknown] = [
        app.login("ada@example.org", "wrong password").await,
        app.login("bob@example.org", "wrong password").await,
    ];
    wrong.refuses(401, "invalid_credentials");
    unknown.refuses(401, "invalid_credentials");
    assert_eq!(wrong.body["detail"], unknown.body["detail"]);

    let grant = app.login("ADA@example.org", "correct horse battery").await;
    assert_eq!(grant.status, StatusCode::OK);
    assert_eq!(
        (grant.text("token_type"), &grant.body["expires_in"]),
        ("Bearer", &600.into())
    );
    let (access, first) = (grant.text("access_token"), grant.text("refresh_token"));
    let bearer = format!("Bearer {access}");
    let me = app
        .send(Method::GET, "/v1/me", None, &[("authorization", &bearer)])
        .await;
    assert_eq!(me.body, user.body);
    // Neither kind of token passes for the other.
    app.refresh(access)
        .await
        .refuses(401, "invalid_credentials");
    let bearer = format!("Bearer {first}");
    let me = app
        .send(Method::GET, "/v1/me", None, &[("authorization", &bearer)])
        .await;
    me.refuses(401, "unauthenticated");
    // A user of another identity provider is who the token says.
    let me = app
        .operate(Method::GET, "/v1/me", None, ("accept", "*/*"))
        .await;
    assert_eq!(
        (me.text("role"), &me.body["email"]),
        ("operator", &Value::Null)
    );

    let logout = app
        .post("/v1/auth/logout", json!({"refresh_token": first}))
        .await;
    assert_eq!(logout.status, StatusCode::NO_CONTENT);
    app.refresh(first).await.refuses(401, "invalid_credentials");
    let logout = app
        .post("/v1/auth/logout", json!({"refresh_token": "unknown"}))
        .await;
    assert_eq!(logout.status, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn of_many_exchanges_at_once_one_token_lives_and_an_old_one_ends_the_session() {
    let app = App::start().await;
    let (email, password) = ("ada@example.org", "correct horse battery");
    app.post(
        "/v1/auth/register",
        json!({"email": email, "password": password, "name": "Ada"}),
    )
    .await;
    let first = app
        .login(email, password)
        .await
        .text("refresh_token")
        .to_owned();
    let other = app
        .login(email, password)
        .await
        .text("refresh_token")
        .to_owned();

    let mut exchanges = JoinSet::new();
    for _ in 0..100 {
        let request = Request::post("/v1/auth/refresh").header("content-type", "application/json");
        let body = json!({"refresh_token": first}).to_string();
        exchanges.spawn(answer(
            app.router.clone(),
            request.body(Body::from(body)).unwrap(),
        ));
    }
    let mut successors: Vec<_> = exchanges
        .join_all()
        .await
        .iter()
        .map(|grant| grant.text("refresh_token").to_owned())
        .collect();
    successors.sort_unstable();
    successors.dedup();
    let [second] = &successors[..] else {
        panic!("{} live tokens", successors.len())
    };

    let third = app.refresh(second).await.text("refresh_token").to_owned();
    // The first one again, though its successor has gone on: somebody else has it.
    app.refresh(&first)
        .await
        .refuses(401, "invalid_credentials");
    app.refresh(&third)
        .await
        .refuses(401, "invalid_credentials");
    // The user's other session is another family.
    assert_eq!(app.refresh(&other).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_product_is_added_once_changed_by_version_and_removed() {
    let app = App::start().await;
    let lamp = json!({"name": "Lamp", "description": "Blue.", "price": {"amount": 1999, "currency": "EUR"}});
    let add = async |body: &Value, key| {
        app.operate(
            Method::POST,
            "/v1/products",
            Some(body.clone()),
            ("idempotency-key", key),
        )
        .await
    };
    let first = add(&lamp, "k-1").await;
    assert_eq!(
        (first.status, &first.headers["etag"]),
        (StatusCode::CREATED, &"\"1\"".parse().unwrap())
    );
    assert!(!first.headers.contains_key("idempotency-replayed"));
    let uri = first.headers["location"].to_str().unwrap().to_owned();
    let mut other = lamp.clone();
    other["name"] = "Desk".into();
    add(&other, "k-1")
        .await
        .refuses(422, "idempotency_key_mismatch");

    let change = async |body: Value, version| {
        app.operate(Method::PATCH, &uri, Some(body), ("if-match", version))
            .await
    };
    app.operate(Method::PATCH, &uri, Some(json!({})), ("accept", "*/*"))
        .await
        .refuses(428, "precondition_required");
    change(json!({"name": "Red lamp"}), "\"2\"")
        .await
        .refuses(412, "precondition_failed");
    change(json!({"name": null}), "\"1\"")
        .await
        .refuses(400, "validation");
    change(json!({"price": {"amount": -1, "currency": "EUR"}}), "\"1\"")
        .await
        .refuses(422, "validation");
    let changed = change(json!({"name": "Red lamp"}), "\"1\"").await;
    assert_eq!(
        (changed.text("name"), changed.text("description")),
        ("Red lamp", "Blue.")
    );
    assert_eq!(changed.headers["etag"], "\"2\"");

    // The retry's answer is the first one, whatever happened since; so is a quoted key's.
    let again = add(&lamp, "\"k-1\"").await;
    assert_eq!(
        (again.status, &again.body),
        (StatusCode::CREATED, &first.body)
    );
    assert_eq!(again.headers["idempotency-replayed"], "true");

    let seen = app
        .send(Method::GET, &uri, None, &[("if-none-match", "\"2\"")])
        .await;
    assert_eq!(seen.status, StatusCode::NOT_MODIFIED);
    let fresh = app
        .send(Method::GET, &uri, None, &[("if-none-match", "\"1\"")])
        .await;
    assert_eq!(fresh.body, changed.body);
    app.operate(Method::DELETE, &uri, None, ("if-match", "\"1\""))
        .await
        .refuses(412, "precondition_failed");
    let gone = app
        .operate(Method::DELETE, &uri, None, ("if-match", "\"2\""))
        .await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    app.get(&uri).await.refuses(404, "not_found");
}

#[tokio::test]
async fn the_catalogue_is_searched_sorted_and_paged_without_gaps() {
    let app = App::start().await;
    for index in 0..7 {
        let product = json!({
            "name": format!("Lamp {}", index % 3),
            "description": if index == 0 { "50%_off" } else { "plain" },
            "price": {"amount": 100 * (index % 2), "currency": "EUR"}
        });
        let added = app
            .operate(
                Method::POST,
                "/v1/products",
                Some(product),
                ("accept", "*/*"),
            )
            .await;
        assert_eq!(added.status, StatusCode::CREATED);
    }
    for (sort, pointer) in [
        ("name", "/name"),
        ("price", "/price/amount"),
        ("created_at", "/created_at"),
    ] {
        for order in ["asc", "desc"] {
            let mut seen = Vec::new();
            let mut cursor = String::new();
            loop {
                let page = app
                    .get(&format!(
                        "/v1/products?sort={sort}&order={order}&limit=3{cursor}"
                    ))
                    .await;
                for product in page.body["data"].as_array().unwrap() {
                    let key = product.pointer(pointer).unwrap().to_string();
                    seen.push((key.len(), key, product["id"].to_string()));
                }
                if page.body["has_more"] == false {
                    break;
                }
                cursor = format!("&cursor={}", page.text("next_cursor"));
            }
            let mut expected = seen.clone();
            expected.sort_unstable();
            expected.dedup();
            if order == "desc" {
                expected.reverse();
            }
            assert_eq!((&seen, seen.len()), (&expected, 7), "{sort} {order}");
        }
    }
    for (query, found) in [
        ("LAMP", 7),
        ("50%25_", 1),
        ("%25", 1),
        ("_", 1),
        ("nothing", 0),
    ] {
        let page = app.get(&format!("/v1/products?q={query}")).await;
        assert_eq!(
            page.body["data"].as_array().unwrap().len(),
            found,
            "{query}"
        );
    }
    let by_age = app.get("/v1/products?limit=1").await;
    let cursor = by_age.text("next_cursor");
    for query in [
        &format!("sort=name&cursor={cursor}"),
        "limit=0",
        "limit=1000000000",
        "cursor=x",
        "colour=red",
        "q=%00",
    ] {
        app.get(&format!("/v1/products?{query}"))
            .await
            .refuses(400, "validation");
    }
}
