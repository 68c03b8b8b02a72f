//! What is somebody else's is as if it were not there, in every route of the OpenAPI document: a new
//! route with an id in its path is in one of the lists below, or the test fails.

use reqwest::Method;
use serde_json::{Value, json};
use stockade::{auth::Role, clock};
use uuid::Uuid;

use crate::support::app::{Answer, App, id, send};

/// What everybody may see, or only people who run things (who are guarded by their role).
const SHARED: &[&str] = &[
    "/v1/images/{file}",
    "/v1/incidents/{id}",
    "/v1/products/{id}",
    "/v1/sales/{id}",
    "/v1/sandbox/{reference}",
    "/v1/users/{id}",
    "/v1/webhooks/{gateway}",
];

/// What belongs to one user, and the body that each way to change it wants.
const OWNED: &[(&str, &str, &str)] = &[
    ("get", "/v1/checkouts/{id}", ""),
    (
        "post",
        "/v1/checkouts/{id}/pay",
        r#"{"payment_method": "sandbox_ok"}"#,
    ),
    ("delete", "/v1/me/api-keys/{id}", ""),
    ("delete", "/v1/me/sessions/{id}", ""),
    ("get", "/v1/orders/{id}", ""),
    ("post", "/v1/orders/{id}/cancel", ""),
    ("post", "/v1/orders/{id}/extend", ""),
    (
        "post",
        "/v1/orders/{id}/pay",
        r#"{"payment_method": "sandbox_ok"}"#,
    ),
];

/// Those of `OWNED` that only operators may use, whoever's it is.
const OPERATED: &[(&str, &str)] = &[("post", "/v1/orders/{id}/refund")];

async fn ask(app: &App, token: &str, method: &str, path: &str, body: &str) -> Answer {
    let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
    let request = app.request(method, path).bearer_auth(token);
    let request = request.header("Idempotency-Key", "foreign");
    if body.is_empty() {
        return send(request).await;
    }
    let request = request.header("Content-Type", "application/json");
    send(request.body(body.to_owned())).await
}

/// Somebody with an account: a token of a session.
async fn registered(app: &App, email: &str) -> String {
    let password = "correct horse battery staple";
    let user = json!({ "email": email, "password": password, "name": "Somebody" });
    let register = app.request(Method::POST, "/v1/auth/register").json(&user);
    send(register).await.expect(201);
    let login = json!({ "email": email, "password": password });
    let login = app.request(Method::POST, "/v1/auth/login").json(&login);
    let grant = send(login).await.expect(200).json();
    grant["access_token"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn what_is_somebody_elses_is_not_there_in_any_route() {
    let app = App::start().await;
    let document = app.get("/openapi.json").await.expect(200).json();
    let mut listed = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        if !path.contains('{') || SHARED.iter().any(|shared| path.starts_with(shared)) {
            continue;
        }
        for method in item.as_object().unwrap().keys() {
            listed.push((method.as_str(), path.as_str()));
        }
    }
    listed.sort_by_key(|(method, path)| (*path, *method));
    let owned = OWNED.iter().map(|(method, path, _)| (*method, *path));
    let mut known: Vec<_> = owned.chain(OPERATED.iter().copied()).collect();
    known.sort_by_key(|(method, path)| (*path, *method));
    assert_eq!(listed, known, "whose are these?");

    let (ada, eve) = (
        registered(&app, "ada@example.org").await,
        registered(&app, "eve@example.org").await,
    );
    let sale = app
        .sale(json!({ "hold_seconds": 600, "payment": "sandbox", "per_buyer_limit": 2 }))
        .await;
    let lines = json!({ "lines": [{ "sale_id": id(&sale), "quantity": 1 }] }).to_string();
    ask(&app, &ada, "put", "/v1/cart", &lines).await.expect(200);
    let checkout = ask(&app, &ada, "post", "/v1/cart/checkout", "").await;
    let checkout = checkout.expect(201).json();
    let key = r#"{"name": "till", "scopes": ["read"]}"#;
    let key = ask(&app, &ada, "post", "/v1/me/api-keys", key).await;
    let sessions = ask(&app, &ada, "get", "/v1/me/sessions", "").await;
    let sessions = sessions.expect(200).json();
    let of = |path: &str| -> String {
        let part = path.strip_prefix("/v1/").unwrap();
        let id = match part.rsplit_once("/{id}").unwrap().0 {
            "checkouts" => id(&checkout).to_owned(),
            "orders" => id(&checkout["orders"][0]).to_owned(),
            "me/sessions" => id(&sessions["data"][0]).to_owned(),
            "me/api-keys" => id(&key.json()).to_owned(),
            other => panic!("no id of {other}"),
        };
        path.replace("{id}", &id)
    };
    let nowhere = |path: &str| path.replace("{id}", &clock::new_id().to_string());
    // Also under the token of somebody without an account here.
    let stranger = app.token(Uuid::from_u128(7), Role::Buyer);
    for token in [&eve, &stranger] {
        for (method, path, body) in OWNED {
            let foreign = ask(&app, token, method, &of(path), body).await;
            let missing = ask(&app, token, method, &nowhere(path), body).await;
            let alike = |answer: &Answer| -> Value {
                let mut body = answer.json();
                body["instance"].take();
                body
            };
            assert_eq!(foreign.status, 404, "{method} {path}: {foreign:?}");
            assert_eq!(alike(&foreign), alike(&missing), "{method} {path}");
        }
        for (method, path) in OPERATED {
            let answer = ask(&app, token, method, &of(path), "{}").await;
            assert_eq!(answer.status, 403, "{method} {path}: {answer:?}");
        }
    }
    // All of it is still as it was, and its owner's.
    for path in ["/v1/orders/{id}", "/v1/checkouts/{id}"] {
        let mine = ask(&app, &ada, "get", &of(path), "").await.expect(200);
        assert!(mine.text.contains(r#""status":"held""#), "{mine:?}");
    }
    let after = ask(&app, &ada, "get", "/v1/me/sessions", "").await.json();
    assert_eq!(after["data"].as_array().unwrap().len(), 1);
    app.finish().await;
}
