//! Accounts and the catalogue over the real router and a real PostgreSQL.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use stockade::auth::Role;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::support::app::{self, send};

/// An application, spoken to in JSON.
struct App(app::App);

struct Answer {
    status: StatusCode,
    headers: reqwest::header::HeaderMap,
    body: Value,
}

impl App {
    async fn start() -> Self {
        Self(app::App::start().await)
    }

    async fn send(
        &self,
        method: Method,
        uri: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> Answer {
        let mut request = self.0.request(method, uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        Answer::of(send(request).await)
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
        let bearer = format!("Bearer {}", self.0.token(self.0.operator, Role::Operator));
        self.send(method, uri, body, &[("authorization", &bearer), header])
            .await
    }

    async fn refresh(&self, token: &str) -> Answer {
        self.post("/v1/auth/refresh", json!({"refresh_token": token}))
            .await
    }

    /// A request with an access token or an API key.
    async fn with(&self, bearer: &str, method: Method, uri: &str, body: Option<Value>) -> Answer {
        let bearer = format!("Bearer {bearer}");
        self.send(method, uri, body, &[("authorization", &bearer)])
            .await
    }

    async fn register(&self, email: &str, password: &str) {
        let user = json!({"email": email, "password": password, "name": "Ada"});
        let answer = self.post("/v1/auth/register", user).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
    }

    async fn login(&self, email: &str, password: &str) -> Answer {
        self.post(
            "/v1/auth/login",
            json!({"email": email, "password": password}),
        )
        .await
    }
}

impl Answer {
    fn of(answer: app::Answer) -> Self {
        let body = serde_json::from_str(&answer.text).unwrap_or(Value::Null);
        Self {
            status: answer.status,
            headers: answer.headers,
            body,
        }
    }

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
    app.0.finish().await;
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
        let body = json!({"refresh_token": first});
        let request = app.0.request(Method::POST, "/v1/auth/refresh").json(&body);
        exchanges.spawn(async move { Answer::of(send(request).await) });
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
    app.0.finish().await;
}

/// Waits until a node refuses a token, as it must within a minute.
async fn refused_by(app: &App, node: &app::Node, token: &str) {
    let ask = || {
        let request = app.0.request(Method::GET, "/v1/me").bearer_auth(token);
        send(node.ask(request))
    };
    let refused = async {
        while ask().await.status != 401 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(app::PATIENCE, refused).await.unwrap();
}

#[tokio::test]
async fn a_user_sees_sessions_and_ends_them_on_every_node() {
    let app = App::start().await;
    let other_node = app.0.node().await;
    let (email, password) = ("ada@example.org", "correct horse battery");
    app.register(email, password).await;
    app.register("eve@example.org", password).await;
    let credentials = json!({"email": email, "password": password});
    let login = async |name| {
        let header = [("user-agent", name)];
        let body = Some(credentials.clone());
        app.send(Method::POST, "/v1/auth/login", body, &header)
            .await
    };
    let (phone, desk) = (login("Phone/1").await, login("Desk/2").await);
    let stranger = app.login("eve@example.org", password).await;
    let token = desk.text("access_token");

    let listed = app.with(token, Method::GET, "/v1/me/sessions", None).await;
    let rows = listed.body["data"].as_array().unwrap();
    let shown: Vec<_> = rows
        .iter()
        .map(|row| (row["user_agent"].as_str().unwrap(), &row["current"]))
        .collect();
    assert_eq!(
        shown,
        [("Desk/2", &json!(true)), ("Phone/1", &json!(false))]
    );
    for row in rows {
        let idle = |member| row[member].as_str().unwrap().parse::<DateTime<Utc>>();
        let idle = idle("expires_at").unwrap() - idle("last_used_at").unwrap();
        assert_eq!(idle, TimeDelta::days(7));
    }
    let first = app
        .with(token, Method::GET, "/v1/me/sessions?limit=1", None)
        .await;
    let next = format!("/v1/me/sessions?cursor={}", first.text("next_cursor"));
    let next = app.with(token, Method::GET, &next, None).await;
    assert_eq!(
        (&first.body["data"][0], &next.body["data"][0]),
        (&rows[0], &rows[1])
    );

    // Whose it is does not show: to others it is not there.
    let phone_session = format!("/v1/me/sessions/{}", rows[1]["id"].as_str().unwrap());
    let nowhere = format!("/v1/me/sessions/{}", Uuid::from_u128(7));
    let [foreign, missing] = [
        (stranger.text("access_token"), &phone_session),
        (token, &nowhere),
    ]
    .map(|(token, uri)| app.with(token, Method::DELETE, uri, None));
    let (mut foreign, mut missing) = (foreign.await, missing.await);
    foreign.refuses(404, "not_found");
    for answer in [&mut foreign, &mut missing] {
        answer.body["instance"] = Value::Null;
    }
    assert_eq!(foreign.body, missing.body);

    let phone_token = phone.text("access_token");
    let whole = async |token: &str| app.with(token, Method::GET, "/v1/me", None).await.status;
    assert_eq!(whole(phone_token).await, StatusCode::OK);
    let ended = app.with(token, Method::DELETE, &phone_session, None).await;
    assert_eq!(ended.status, StatusCode::NO_CONTENT);
    assert_eq!(whole(phone_token).await, StatusCode::UNAUTHORIZED);
    app.refresh(phone.text("refresh_token"))
        .await
        .refuses(401, "invalid_credentials");
    refused_by(&app, &other_node, phone_token).await;
    app.with(token, Method::DELETE, &phone_session, None)
        .await
        .refuses(404, "not_found");
    assert_eq!(whole(token).await, StatusCode::OK);

    // However a session ends, its access token ends with it.
    let left = login("Left").await;
    app.post(
        "/v1/auth/logout",
        json!({"refresh_token": left.text("refresh_token")}),
    )
    .await;
    let everywhere = login("Everywhere").await;
    let all = app
        .with(token, Method::POST, "/v1/auth/logout-all", None)
        .await;
    assert_eq!(all.status, StatusCode::NO_CONTENT);
    for grant in [&left, &everywhere, &desk] {
        let token = grant.text("access_token");
        assert_eq!(whole(token).await, StatusCode::UNAUTHORIZED);
        refused_by(&app, &other_node, token).await;
    }
    // Nobody deletes a user, or a session, unheard.
    sqlx::query("DELETE FROM users WHERE email = 'eve@example.org'")
        .execute(&mut app::sql(&app.0).await)
        .await
        .unwrap();
    refused_by(&app, &other_node, stranger.text("access_token")).await;
    other_node.stop().await;
    app.0.finish().await;
}

#[tokio::test]
async fn another_password_ends_the_other_sessions() {
    let app = App::start().await;
    let (email, old, new) = ("ada@example.org", "correct horse battery", "staple, then");
    app.register(email, old).await;
    let (mine, other) = (app.login(email, old).await, app.login(email, old).await);
    let token = mine.text("access_token");
    let change = async |old: &str, new: &str| {
        let body = json!({"old_password": old, "new_password": new});
        app.with(token, Method::POST, "/v1/auth/password", Some(body))
            .await
    };
    change("a wrong one", new)
        .await
        .refuses(401, "invalid_credentials");
    for bad in ["short", "password123", &"x".repeat(73)] {
        change(old, bad).await.refuses(422, "validation");
    }
    assert_eq!(
        app.refresh(other.text("refresh_token")).await.status,
        StatusCode::OK
    );

    // Whoever is about to log in with the old one is either too late, or ends with the others.
    let mut logins = JoinSet::new();
    for _ in 0..12 {
        let body = json!({"email": email, "password": old});
        let request = app.0.request(Method::POST, "/v1/auth/login").json(&body);
        logins.spawn(async move { Answer::of(send(request).await) });
    }
    let changed = change(old, new).await;
    assert_eq!(changed.status, StatusCode::NO_CONTENT, "{}", changed.body);
    for grant in logins.join_all().await {
        if let Some(token) = grant.body["refresh_token"].as_str() {
            app.refresh(token).await.refuses(401, "invalid_credentials");
        }
    }
    app.refresh(other.text("refresh_token"))
        .await
        .refuses(401, "invalid_credentials");
    app.with(other.text("access_token"), Method::GET, "/v1/me", None)
        .await
        .refuses(401, "unauthenticated");
    app.login(email, old)
        .await
        .refuses(401, "invalid_credentials");
    assert_eq!(
        app.refresh(mine.text("refresh_token")).await.status,
        StatusCode::OK
    );
    assert_eq!(app.login(email, new).await.status, StatusCode::OK);
    // Whoever has no password here cannot change it.
    let body = json!({"old_password": old, "new_password": new});
    app.operate(
        Method::POST,
        "/v1/auth/password",
        Some(body),
        ("accept", "*/*"),
    )
    .await
    .refuses(401, "invalid_credentials");
    app.0.finish().await;
}

#[tokio::test]
async fn a_hash_of_another_cost_is_made_anew_at_login() {
    let app = App::start().await;
    let (email, password) = ("ada@example.org", "correct horse battery");
    app.register(email, password).await;
    let mut sql = app::sql(&app.0).await;
    sqlx::query("UPDATE users SET password_hash = $1")
        .bind(bcrypt::hash(password, 4).unwrap())
        .execute(&mut sql)
        .await
        .unwrap();
    for _ in 0..2 {
        assert_eq!(app.login(email, password).await.status, StatusCode::OK);
        let hash: String = sqlx::query_scalar("SELECT password_hash FROM users")
            .fetch_one(&mut sql)
            .await
            .unwrap();
        assert!(hash.starts_with("$2b$10$"), "{hash}");
    }
    app.0.finish().await;
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
    app.0.finish().await;
}

#[tokio::test]
async fn the_catalogue_is_searched_sorted_and_paged_without_gaps() {
    let app = App::start().await;
    for index in 0..7 {
        let product = json!({
            "name": format!("Lamp {}", index % 3),
            "description": if index == 0 { "50%_off" } else { "plain, or so" },
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
        ("pla+LA", 6),
        ("50%25", 1),
        ("%25", 0),
        ("_", 0),
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
    app.0.finish().await;
}
