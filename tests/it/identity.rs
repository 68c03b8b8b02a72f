//! Who may come in, and as what: API keys, and what passes for what.

use std::{
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use axum::{
    Router,
    body::Body,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::TimeDelta;
use futures::stream;
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use stockade::{
    auth::{
        Role,
        api_key::ApiKey,
        token::{Secret, TokenKeys},
    },
    clock,
};
use tokio::{io::AsyncWriteExt, net::TcpListener, process::Command, sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::support::app::{self, Answer, App, Node, id, send};

const PASSWORD: &str = "correct horse battery";

/// A user with a session.
struct User {
    email: String,
    token: String,
    refresh: String,
}

impl User {
    /// Registers somebody and logs in; anything but a buyer is made one by hand.
    async fn new(app: &App, name: &str, role: Role) -> Self {
        let email = format!("{name}@example.org");
        let body = json!({"email": email, "password": PASSWORD, "name": name});
        send(app.request(Method::POST, "/v1/auth/register").json(&body))
            .await
            .expect(201);
        sqlx::query("UPDATE users SET role = $2 WHERE email = $1")
            .bind(&email)
            .bind(role.as_str())
            .execute(&mut app::sql(app).await)
            .await
            .unwrap();
        let grant = login(app, &email).await.expect(200).json();
        Self {
            email,
            token: grant["access_token"].as_str().unwrap().to_owned(),
            refresh: grant["refresh_token"].as_str().unwrap().to_owned(),
        }
    }

    /// Makes an API key with these scopes; gives its id and its text.
    async fn key(&self, app: &App, scopes: &[&str]) -> (String, String) {
        let body = json!({"name": "A machine", "scopes": scopes});
        let made = with(app, &self.token, Method::POST, "/v1/me/api-keys", &body).await;
        let made = made.expect(201).json();
        (
            id(&made).to_owned(),
            made["key"].as_str().unwrap().to_owned(),
        )
    }
}

async fn login(app: &App, email: &str) -> Answer {
    let body = json!({"email": email, "password": PASSWORD});
    send(app.request(Method::POST, "/v1/auth/login").json(&body)).await
}

/// A request with this bearer; a null body is none.
async fn with(app: &App, bearer: &str, method: Method, path: &str, body: &Value) -> Answer {
    let mut request = app.request(method, path).bearer_auth(bearer);
    if !body.is_null() {
        request = request.header("idempotency-key", "k").json(body);
    }
    send(request).await
}

async fn look(app: &App, bearer: &str) -> u16 {
    let answer = with(app, bearer, Method::GET, "/v1/me", &Value::Null).await;
    answer.status.as_u16()
}

/// Waits until this bearer gets this answer.
async fn until_seen(app: &App, bearer: &str, status: u16) {
    let waiting = async {
        while look(app, bearer).await != status {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(app::PATIENCE, waiting).await.unwrap();
}

/// A counter of this node.
async fn counted(app: &App, name: &str) -> u64 {
    let metrics = app.get("/metrics").await.expect(200).text;
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn an_api_key_does_what_its_scopes_say_and_no_more() {
    let app = App::start().await;
    let sale = app.sale(json!({"allocation": 10})).await;
    let orders = format!("/v1/sales/{}/orders", id(&sale));
    let restock = format!("/v1/sales/{}/restock", id(&sale));
    let buyer = User::new(&app, "ada", Role::Buyer).await;
    let operator = User::new(&app, "olga", Role::Operator).await;
    let admin = User::new(&app, "anna", Role::Admin).await;
    for (user, scopes, [sees, buys, restocks]) in [
        (&buyer, &["read"][..], [200, 403, 403]),
        (&buyer, &["buy"], [403, 201, 403]),
        (&buyer, &["read", "buy"], [200, 201, 403]),
        (&operator, &["read", "buy"], [200, 201, 403]),
        (&operator, &["operate"], [200, 201, 200]),
        (&admin, &["operate", "operate"], [200, 201, 200]),
    ] {
        let (_, key) = user.key(&app, scopes).await;
        let ask = async |method, path: &str, body| {
            let answer = with(&app, &key, method, path, &body).await;
            answer.status.as_u16()
        };
        let what = format!("{} {scopes:?}", user.email);
        assert_eq!(
            ask(Method::GET, "/v1/orders", Value::Null).await,
            sees,
            "{what}"
        );
        assert_eq!(
            ask(Method::POST, &orders, json!({"quantity": 1})).await,
            buys,
            "{what}"
        );
        assert_eq!(
            ask(Method::POST, &restock, json!({"units": 1})).await,
            restocks,
            "{what}"
        );
    }

    // The document says which operations take a key. No key manages the account that it acts for.
    let (_, key) = admin.key(&app, &["read", "buy", "operate"]).await;
    let document = app.get("/openapi.json").await.expect(200).json();
    let (mut of_machines, mut of_persons) = (0, 0);
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let Some(ways) = operation.get("security") else {
                continue;
            };
            let takes_keys = ways.to_string().contains("api_key");
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let path = path
                .replace("{round}", "1")
                .replace("{id}", &Uuid::nil().to_string())
                .replace("{image}", &Uuid::nil().to_string());
            let answer = with(&app, &key, method.clone(), &path, &Value::Null).await;
            if takes_keys {
                of_machines += 1;
                assert_ne!(answer.status, 401, "{method} {path}: {answer:?}");
                let scope = answer.text.contains("scope");
                assert!(!scope, "{method} {path}: {answer:?}");
            } else {
                of_persons += 1;
                assert_eq!(answer.status, 403, "{method} {path}: {answer:?}");
            }
        }
    }
    assert!(
        of_machines > 20 && of_persons >= 7,
        "{of_machines} {of_persons}"
    );
    app.finish().await;
}

#[tokio::test]
async fn an_api_key_is_shown_once_counted_and_revoked_on_every_node() {
    let app = App::start().await;
    let other_node = app.node().await;
    let ada = User::new(&app, "ada", Role::Buyer).await;
    let eve = User::new(&app, "eve", Role::Buyer).await;
    let make =
        async |body: Value| with(&app, &ada.token, Method::POST, "/v1/me/api-keys", &body).await;
    let past = clock::now() - TimeDelta::minutes(1);
    for (status, body) in [
        (400, json!({"name": "x", "scopes": ["everything"]})),
        (
            400,
            json!({"name": "x", "scopes": ["read"], "expires_at": null}),
        ),
        (422, json!({"name": "x", "scopes": []})),
        (422, json!({"name": "x", "scopes": ["operate"]})),
        (422, json!({"name": "", "scopes": ["read"]})),
        (
            422,
            json!({"name": "x", "scopes": ["read"], "expires_at": past}),
        ),
    ] {
        make(body).await.expect(status);
    }

    let (first, key) = ada.key(&app, &["buy", "read"]).await;
    let listed = || {
        with(
            &app,
            &ada.token,
            Method::GET,
            "/v1/me/api-keys",
            &Value::Null,
        )
    };
    let shown = listed().await.expect(200);
    assert!(!shown.text.contains("sk_stockade_"), "{shown:?}");
    let row = &shown.json()["data"][0];
    assert_eq!(
        (row["id"].as_str(), &row["scopes"], &row["last_used_at"]),
        (Some(first.as_str()), &json!(["read", "buy"]), &Value::Null)
    );
    assert_eq!(look(&app, &key).await, 200);
    let shown = listed().await.expect(200).json();
    assert!(shown["data"][0]["last_used_at"].is_string(), "{shown}");

    // PostgreSQL is asked now and then, not each time, and only about what may be a key.
    let asked = async || counted(&app, "stockade_identity_keys_asked_total").await;
    let wrong = ApiKey::random().unwrap().text();
    let mistyped = format!("{}x", &wrong[..wrong.len() - 1]);
    for (bearer, status, most) in [(&key, 200, 5), (&wrong, 401, 5), (&mistyped, 401, 0)] {
        let before = asked().await;
        for _ in 0..20 {
            assert_eq!(look(&app, bearer).await, status);
        }
        assert!(asked().await - before <= most);
    }
    // A flood of wrong ones is refused, and what is known goes on.
    let flood = (0..300).map(|_| {
        let key = ApiKey::random().unwrap().text();
        app.request(Method::GET, "/v1/me").bearer_auth(key)
    });
    let (answers, known) = tokio::join!(app::crowd(flood), look(&app, &key));
    assert_eq!(known, 200);
    for answer in answers {
        assert!(
            answer.status == 401 || answer.header("retry-after").is_some(),
            "{answer:?}"
        );
    }

    // Whose key it is does not show.
    let path = format!("/v1/me/api-keys/{first}");
    with(&app, &eve.token, Method::DELETE, &path, &Value::Null)
        .await
        .expect(404);
    let elsewhere = || app.request(Method::GET, "/v1/me").bearer_auth(&key);
    send(other_node.ask(elsewhere())).await.expect(200);
    with(&app, &ada.token, Method::DELETE, &path, &Value::Null)
        .await
        .expect(204);
    assert_eq!(look(&app, &key).await, 401);
    with(&app, &ada.token, Method::DELETE, &path, &Value::Null)
        .await
        .expect(404);
    let refused = async {
        while send(other_node.ask(elsewhere())).await.status != 401 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let within = Duration::from_mins(1);
    tokio::time::timeout(within, refused).await.unwrap();

    for (seconds, until) in [(3_600, 200), (5, 401)] {
        let expires_at = (clock::now() + TimeDelta::seconds(seconds)).to_rfc3339();
        let body = json!({"name": "Short", "scopes": ["read"], "expires_at": expires_at});
        let made = make(body).await.expect(201).json();
        let key = made["key"].as_str().unwrap();
        until_seen(&app, key, until).await;
    }
    // So many at once, and one more is one too many; one that has expired makes room.
    let many = (0..25).map(|_| {
        let body = json!({"name": "Many", "scopes": ["read"]});
        app.request(Method::POST, "/v1/me/api-keys")
            .bearer_auth(&ada.token)
            .json(&body)
    });
    let made = app::crowd(many).await;
    let made = made.iter().filter(|answer| answer.status == 201).count();
    assert_eq!(made, 19, "one was there, and one has expired");
    make(json!({"name": "x", "scopes": ["read"]}))
        .await
        .expect(409);
    // Users of another provider have no keys here.
    let stranger = app.token(clock::new_id(), Role::Buyer);
    let body = json!({"name": "x", "scopes": ["read"]});
    with(&app, &stranger, Method::POST, "/v1/me/api-keys", &body)
        .await
        .expect(409);
    other_node.stop().await;
    app.finish().await;
}

#[tokio::test]
async fn nothing_passes_for_what_it_is_not() {
    let app = App::start().await;
    let ada = User::new(&app, "ada", Role::Buyer).await;
    let (_, key) = ada.key(&app, &["read", "buy"]).await;
    let foreign = ApiKey::random().unwrap().text();
    let token = &app.token(clock::new_id(), Role::Buyer);
    for (what, text, bears, refreshes) in [
        ("access token", &ada.token, 200, 401),
        ("access token of another signer", token, 200, 401),
        ("API key", &key, 200, 401),
        ("API key of nobody", &foreign, 401, 401),
        ("password", &PASSWORD.to_owned(), 401, 401),
        ("refresh token", &ada.refresh, 401, 200),
    ] {
        assert_eq!(look(&app, text).await, bears, "{what}");
        let body = json!({"email": ada.email, "password": text});
        if what != "password" {
            // bcrypt reads 72 bytes, and a password has no more.
            send(app.request(Method::POST, "/v1/auth/login").json(&body))
                .await
                .expect(401);
        }
        let body = json!({"refresh_token": text});
        let answer = send(app.request(Method::POST, "/v1/auth/refresh").json(&body)).await;
        assert_eq!(answer.status.as_u16(), refreshes, "{what}");
    }
    app.finish().await;
}

/// Two nodes behind one address each, restarted one after the other with other keys.
struct Fleet {
    nodes: Vec<Node>,
    doors: Vec<watch::Sender<String>>,
}

impl Fleet {
    async fn start(app: &App) -> Self {
        let nodes = vec![app.node().await, app.node().await];
        let doors = nodes.iter().map(|node| node.door().borrow().clone());
        let doors = doors.map(watch::Sender::new).collect();
        Self { nodes, doors }
    }

    /// Gives every node these keys; before and after each there are requests.
    async fn roll(&mut self, app: &mut App, keys: &str, asked: &AtomicU64) {
        app.set("STOCKADE_JWT_KEYS", keys);
        for (node, door) in self.nodes.iter_mut().zip(&self.doors) {
            some_more(asked).await;
            let new = app.node().await;
            door.send_replace(new.door().borrow().clone());
            std::mem::replace(node, new).stop().await;
        }
        some_more(asked).await;
    }
}

/// Waits until everybody has asked a few times more.
async fn some_more(asked: &AtomicU64) {
    let until = asked.load(Ordering::Relaxed) + 40;
    let waiting = async {
        while asked.load(Ordering::Relaxed) < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(app::PATIENCE, waiting).await.unwrap();
}

#[tokio::test]
async fn signing_keys_change_under_load_without_a_single_refusal() {
    const NEW: &str = "the key that comes after it: 32 bytes";
    let mut app = App::start().await;
    let mut fleet = Fleet::start(&app).await;
    let asked = Arc::new(AtomicU64::new(0));
    let stop = CancellationToken::new();
    let mut clients = JoinSet::new();
    for number in 0..4 {
        let user = User::new(&app, &format!("user{number}"), Role::Buyer).await;
        let (asked, stop, url) = (Arc::clone(&asked), stop.clone(), app.url.clone());
        let client = app.client.clone();
        let mut doors: Vec<_> = fleet.doors.iter().map(watch::Sender::subscribe).collect();
        clients.spawn(async move {
            let (mut token, mut refresh) = (user.token, user.refresh);
            while !stop.is_cancelled() {
                // What one node has signed the other believes.
                for _ in 0..4 {
                    doors.rotate_left(1);
                    let me = client.get(format!("{url}/v1/me")).bearer_auth(&token);
                    app::insist(me, &doors).await.expect(200);
                    asked.fetch_add(1, Ordering::Relaxed);
                }
                let next = client.post(format!("{url}/v1/auth/refresh"));
                let next = next.json(&json!({"refresh_token": refresh}));
                let grant = app::insist(next, &doors).await.expect(200).json();
                token = grant["access_token"].as_str().unwrap().to_owned();
                refresh = grant["refresh_token"].as_str().unwrap().to_owned();
            }
        });
    }
    let old = app::SECRET;
    fleet.roll(&mut app, &format!("1,2:{NEW}"), &asked).await;
    fleet.roll(&mut app, &format!("2:{NEW},1"), &asked).await;
    // By now every client has refreshed; what the old key signed would have expired.
    some_more(&asked).await;
    fleet.roll(&mut app, &format!("2:{NEW}"), &asked).await;
    stop.cancel();
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }

    // The application's own node has the old key alone, these have the new one alone.
    let signed_by = |id: &str, secret: &str| {
        let bytes = secret.as_bytes();
        let keys = TokenKeys::new(&[Secret { id, bytes }], 600).unwrap();
        app::token(&keys, clock::new_id(), Role::Buyer)
    };
    for (id, secret, here, there) in [
        ("1", old, 200, 401),
        ("2", NEW, 401, 200),
        ("1", NEW, 401, 401),
        ("2", old, 401, 401),
    ] {
        let token = signed_by(id, secret);
        assert_eq!(look(&app, &token).await, here, "key {id}");
        let me = app.request(Method::GET, "/v1/me").bearer_auth(&token);
        let answer = send(fleet.nodes[0].ask(me)).await;
        assert_eq!(answer.status, there, "key {id}");
    }
    for node in fleet.nodes {
        node.stop().await;
    }
    app.finish().await;
}

/// `stockade user` on the application's stores: how it ended, and what it printed.
async fn user_command(app: &App, arguments: &[&str], stdin: &str) -> (bool, String) {
    let endpoints = app.endpoints();
    let mut running = Command::new(env!("CARGO_BIN_EXE_stockade"))
        .arg("user")
        .args(arguments)
        .env_clear()
        .envs(app.environment())
        .env("REDIS_URL", endpoints.redis_url.expose_secret())
        .env("DATABASE_URL", endpoints.database_url.expose_secret())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = running.stdin.take().unwrap();
    input.write_all(stdin.as_bytes()).await.unwrap();
    drop(input);
    let output = running.wait_with_output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[tokio::test]
async fn admins_manage_users_and_nobody_else_does() {
    let app = App::start().await;
    let other_node = app.node().await;
    let (added, text) = user_command(
        &app,
        &["add", "--email", "root@example.org", "--role", "admin"],
        &format!("{PASSWORD}\n"),
    )
    .await;
    assert!(added && text.contains(" admin root@example.org"), "{text}");
    let admin = login(&app, "root@example.org").await.expect(200).json();
    let (admin, admin_id) = {
        let token = admin["access_token"].as_str().unwrap().to_owned();
        let me = with(&app, &token, Method::GET, "/v1/me", &Value::Null).await;
        (token, id(&me.json()).to_owned())
    };
    let ada = User::new(&app, "ada", Role::Buyer).await;
    let olga = User::new(&app, "olga", Role::Operator).await;
    let (_, key) = ada.key(&app, &["read"]).await;

    let listed = async |query: &str| {
        let path = format!("/v1/users?{query}");
        let page = with(&app, &admin, Method::GET, &path, &Value::Null).await;
        page.expect(200).json()
    };
    let all = listed("limit=2").await;
    assert_eq!(all["has_more"], true);
    assert_eq!(all["data"].as_array().unwrap().len(), 2);
    let rest = listed(&format!("cursor={}", all["next_cursor"].as_str().unwrap())).await;
    assert_eq!(rest["data"][0]["email"], "root@example.org");
    assert_eq!(
        listed("role=operator").await["data"][0]["email"],
        olga.email
    );
    let found = listed("email=%20ADA@example.org").await;
    let ada_path = format!("/v1/users/{}", id(&found["data"][0]));
    let change =
        async |path: &str, body: Value| with(&app, &admin, Method::PATCH, path, &body).await;
    for body in [
        json!({"role": null}),
        json!({"role": "king"}),
        json!({"email": "x"}),
    ] {
        change(&ada_path, body).await.expect(400);
    }
    change(&format!("/v1/users/{}", Uuid::nil()), json!({}))
        .await
        .expect(404);
    // One admin is always left.
    for body in [json!({"disabled": true}), json!({"role": "buyer"})] {
        change(&format!("/v1/users/{admin_id}"), body)
            .await
            .expect(409);
    }

    // Another role begins with the next login.
    let same = change(&ada_path, json!({"role": "buyer"})).await;
    assert_eq!(same.expect(200).json()["role"], "buyer");
    assert_eq!(look(&app, &ada.token).await, 200);
    change(&ada_path, json!({"role": "operator"}))
        .await
        .expect(200);
    let on_other_node = async |bearer: &str| {
        let me = app.request(Method::GET, "/v1/me").bearer_auth(bearer);
        send(other_node.ask(me)).await.status.as_u16()
    };
    let refused_there = async |bearer: &str| {
        let waiting = async {
            while on_other_node(bearer).await != 401 {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let minute = Duration::from_mins(1);
        tokio::time::timeout(minute, waiting).await.unwrap();
    };
    assert_eq!(look(&app, &ada.token).await, 401);
    refused_there(&ada.token).await;
    let again = login(&app, &ada.email).await.expect(200).json();
    let token = again["access_token"].as_str().unwrap();
    let me = with(&app, token, Method::GET, "/v1/me", &Value::Null).await;
    assert_eq!(me.json()["role"], "operator");

    // Disabled: no session, no key, no login, and no token that somebody else has signed.
    let signed_elsewhere = app.token(id(&found["data"][0]).parse().unwrap(), Role::Buyer);
    assert_eq!(look(&app, &key).await, 200);
    assert_eq!(on_other_node(&key).await, 200);
    let disabled = change(&ada_path, json!({"disabled": true})).await;
    assert!(disabled.expect(200).json()["disabled_at"].is_string());
    assert_eq!(look(&app, token).await, 401);
    assert_eq!(look(&app, &key).await, 401);
    for bearer in [token, &key, &signed_elsewhere] {
        refused_there(bearer).await;
    }
    let refresh = json!({"refresh_token": again["refresh_token"]});
    send(app.request(Method::POST, "/v1/auth/refresh").json(&refresh))
        .await
        .expect(401);
    let closed = login(&app, &ada.email).await.expect(401).json();
    let unknown = login(&app, "nobody@example.org").await.expect(401).json();
    assert_eq!(closed["detail"], unknown["detail"]);
    change(&ada_path, json!({"disabled": false}))
        .await
        .expect(200);
    let again = login(&app, &ada.email).await.expect(200).json();
    let token = again["access_token"].as_str().unwrap();
    assert_eq!(look(&app, token).await, 200);
    assert_eq!(on_other_node(token).await, 200);
    assert_eq!(look(&app, &key).await, 401);
    other_node.stop().await;
    app.finish().await;
}

#[tokio::test]
async fn users_are_managed_on_the_command_line_too() {
    let app = App::start().await;
    let mail = ["--email", "Bob@example.org"];
    let run = async |arguments: &[&str], stdin: &str| {
        let arguments = [arguments, &mail].concat();
        user_command(&app, &arguments, stdin).await
    };
    let (added, text) = run(&["add", "--role", "buyer", "--generate-password"], "").await;
    assert!(added, "{text}");
    let password = text.split("password: ").nth(1).unwrap().trim().to_owned();
    let login = async || {
        let body = json!({"email": "bob@example.org", "password": password});
        send(app.request(Method::POST, "/v1/auth/login").json(&body)).await
    };
    login().await.expect(200);
    for (arguments, stdin, part) in [
        (
            &["add", "--role", "buyer"][..],
            "another good one\n",
            "exists",
        ),
        (&["add", "--role", "buyer"], "short\n", "too weak"),
        (&["add", "--role", "buyer"], "", "too weak"),
        (&["add", "--role", "king"], "", "king"),
    ] {
        let (done, text) = run(arguments, stdin).await;
        assert!(!done && text.contains(part), "{text}");
    }
    for (arguments, part) in [
        (
            &["role", "--role", "operator"][..],
            "operator bob@example.org",
        ),
        (&["disable"], "(disabled)"),
    ] {
        let (done, text) = run(arguments, "").await;
        assert!(done && text.contains(part), "{text}");
    }
    login().await.expect(401);
    let (_, listed) = user_command(&app, &["list", "--json", "--role", "operator"], "").await;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["email"], "bob@example.org");
    assert!(listed[0]["disabled_at"].is_string());
    let (_, listed) = user_command(&app, &["list"], "").await;
    assert!(
        listed.contains("operator (disabled) bob@example.org"),
        "{listed}"
    );
    let (done, _) = run(&["enable"], "").await;
    assert!(done);
    login().await.expect(200);
    let (done, text) = user_command(&app, &["disable", "--email", "nobody@example.org"], "").await;
    assert!(!done && text.contains("no user"), "{text}");
    app.finish().await;
}

/// An identity provider of its own: keys under `/keys`, as they are at the moment.
#[derive(Clone, Default)]
struct Provider(Arc<Mutex<Given>>);

#[derive(Default)]
struct Given {
    /// Its keys; none, and it does not answer.
    keys: Option<Value>,
    /// Sends everybody elsewhere instead.
    elsewhere: bool,
    /// Never ends its answer.
    endless: bool,
    asked: u64,
}

impl Provider {
    /// Answers on a port of its own; gives the address of its keys.
    async fn listen(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/keys", get(async |State(it): State<Self>| it.answer()))
            .route(
                "/elsewhere",
                get(async |State(it): State<Self>| it.answer_elsewhere()),
            )
            .with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("{url}/keys")
    }

    fn answer(&self) -> Response {
        let mut given = self.0.lock().unwrap();
        given.asked += 1;
        if given.elsewhere {
            return Redirect::temporary("/elsewhere").into_response();
        }
        if given.endless {
            let chunk = || Ok::<_, std::io::Error>(vec![b' '; 16 * 1024]);
            return Body::from_stream(stream::iter(std::iter::repeat_with(chunk))).into_response();
        }
        match &given.keys {
            Some(keys) => axum::Json(json!({"keys": keys})).into_response(),
            None => StatusCode::BAD_GATEWAY.into_response(),
        }
    }

    fn answer_elsewhere(&self) -> Response {
        let keys = self.0.lock().unwrap().keys.clone();
        axum::Json(json!({"keys": keys})).into_response()
    }

    fn give(&self, change: impl FnOnce(&mut Given)) {
        change(&mut self.0.lock().unwrap());
    }

    /// Waits until it was asked so often.
    async fn asked(&self, times: u64) {
        let waiting = async {
            while self.0.lock().unwrap().asked < times {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(app::PATIENCE, waiting).await.unwrap();
    }
}

/// A key of the provider, and its public half under a name.
struct Signer(EcdsaKeyPair, &'static str);

impl Signer {
    fn new(kid: &'static str) -> Self {
        Self(
            EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            kid,
        )
    }

    fn public(&self) -> Value {
        let point = self.0.public_key().as_ref();
        json!({
            "kty": "EC", "crv": "P-256", "kid": self.1, "use": "sig", "alg": "ES256",
            "x": BASE64_URL_SAFE_NO_PAD.encode(&point[1..33]),
            "y": BASE64_URL_SAFE_NO_PAD.encode(&point[33..65]),
        })
    }

    fn token(&self, subject: &str, groups: &[&str]) -> String {
        let header = json!({"alg": "ES256", "kid": self.1, "typ": "at+jwt"});
        let claims = json!({
            "iss": "https://id.example.org/", "aud": ["shop", "other"], "sub": subject,
            "exp": clock::now().timestamp() + 300, "groups": groups,
            "registered_at": "2023-11-14T22:13:20Z",
        });
        let [header, claims] =
            [header, claims].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
        let message = format!("{header}.{claims}");
        let signature = self
            .0
            .sign(&SystemRandom::new(), message.as_bytes())
            .unwrap();
        format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

#[tokio::test]
async fn tokens_of_an_outside_provider_are_taken_whether_it_is_there_or_not() {
    let provider = Provider::default();
    let (first, second) = (Signer::new("first"), Signer::new("second"));
    provider.give(|given| given.elsewhere = true);
    let url = provider.listen().await;
    let mut app = App::without_node(&[
        ("STOCKADE_JWKS_URL", &url),
        ("STOCKADE_JWT_ISSUER", "https://id.example.org/"),
        ("STOCKADE_JWT_AUDIENCE", "shop"),
        ("STOCKADE_JWT_ROLE_CLAIM", "groups"),
        ("STOCKADE_JWT_OPERATOR_ROLES", "sellers, staff"),
        ("STOCKADE_JWT_ADMIN_ROLES", "it"),
    ])
    .await;
    provider.give(|given| given.keys = Some(json!([first.public()])));
    app.run().await;
    provider.asked(1).await;
    let token = first.token("auth0|7", &["customers"]);
    // It sends us elsewhere, where we do not go; so nobody knows yet whether this is genuine.
    assert_eq!(look(&app, &token).await, 503);
    assert_eq!(look(&app, "nonsense").await, 401);
    provider.give(|given| (given.elsewhere, given.endless) = (false, true));
    provider.asked(2).await;
    assert_eq!(look(&app, &token).await, 503);
    provider.give(|given| given.endless = false);
    until_seen(&app, &token, 200).await;

    // It has keys: they stay while it is away, and its subjects are always the same users.
    provider.give(|given| given.keys = None);
    let me = async |token: &str| {
        let answer = with(&app, token, Method::GET, "/v1/me", &Value::Null).await;
        answer.expect(200).json()
    };
    let seven = me(&token).await;
    assert_eq!(
        (&seven["role"], &seven["email"]),
        (&json!("buyer"), &Value::Null)
    );
    assert_eq!(
        me(&first.token("auth0|7", &["staff"])).await["id"],
        seven["id"]
    );
    assert_ne!(me(&first.token("auth0|8", &[])).await["id"], seven["id"]);
    for (groups, role) in [
        (&["staff"][..], "operator"),
        (&["x", "it"], "admin"),
        (&["Staff"], "buyer"),
    ] {
        assert_eq!(me(&first.token("auth0|7", groups)).await["role"], role);
    }
    let terms = json!({"allocation": 2, "min_account_age_seconds": 31_536_000});
    let sale = app.sale(terms).await;
    let path = format!("/v1/sales/{}/orders", id(&sale));
    let order = with(&app, &token, Method::POST, &path, &json!({"quantity": 1})).await;
    assert_eq!(order.expect(201).json()["buyer_id"], seven["id"]);
    let path = format!("/v1/sales/{}/restock", id(&sale));
    let body = json!({"units": 1});
    with(&app, &token, Method::POST, &path, &body)
        .await
        .expect(403);
    let staff = first.token("auth0|9", &["sellers"]);
    with(&app, &staff, Method::POST, &path, &body)
        .await
        .expect(200);

    // Another key: whoever brings it makes us look, and a thousand who make one up do not make us
    // look more often.
    let before = provider.0.lock().unwrap().asked;
    provider.give(|given| given.keys = Some(json!([second.public()])));
    let made_up = Signer::new("made up").token("auth0|7", &["it"]);
    let crowd = (0..200).map(|_| app.request(Method::GET, "/v1/me").bearer_auth(&made_up));
    for answer in app::crowd(crowd).await {
        assert_eq!(answer.status, 401);
    }
    assert!(provider.0.lock().unwrap().asked <= before + 1);
    let token = second.token("auth0|7", &[]);
    until_seen(&app, &token, 200).await;
    // What the provider has taken back is gone, and our own tokens were there all the time.
    assert_eq!(look(&app, &first.token("auth0|7", &[])).await, 401);
    assert_eq!(
        look(&app, &app.token(clock::new_id(), Role::Buyer)).await,
        200
    );
    app.finish().await;
}
