//! Who is not let in.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use stockade::{auth::Role, clock};
use uuid::Uuid;

use super::{Unchanged, refused};
use crate::support::app::{App, SECRET, id, send};

const HOUR_SECONDS: i64 = 3600;

/// A token that is let in, before anything is done to it.
fn good() -> (Value, Value) {
    let now = clock::now().timestamp();
    let header = json!({"alg": "HS256", "typ": "at+jwt"});
    let claims = json!({
        "iss": "stockade", "aud": "stockade", "sub": clock::new_id(), "role": "buyer",
        "iat": now, "exp": now + 60, "jti": clock::new_id(),
    });
    (header, claims)
}

fn signed(header: &Value, claims: &Value, algorithm: Algorithm, secret: &str) -> String {
    let [header, claims] =
        [header, claims].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
    let message = format!("{header}.{claims}");
    let key = EncodingKey::from_secret(secret.as_bytes());
    let signature = crypto::sign(message.as_bytes(), &key, algorithm).unwrap();
    format!("{message}.{signature}")
}

/// A good token with members of its header or claims replaced; null takes one away.
fn with(part: &str, member: &str, value: Value) -> String {
    let (mut header, mut claims) = good();
    let changed = if part == "header" {
        &mut header
    } else {
        &mut claims
    };
    if value.is_null() {
        changed.as_object_mut().unwrap().remove(member);
    } else {
        changed[member] = value;
    }
    signed(&header, &claims, Algorithm::HS256, SECRET)
}

/// Tokens that are let in, each with what is special about it.
fn welcome() -> Vec<(&'static str, String)> {
    let now = clock::now().timestamp();
    vec![
        ("nothing", with("claims", "sid", Value::Null)),
        (
            "an audience of several",
            with("claims", "aud", json!(["shop", "stockade"])),
        ),
        ("valid since now", with("claims", "nbf", json!(now))),
        ("a session", with("claims", "sid", json!(clock::new_id()))),
        ("a type in capitals", with("header", "typ", json!("AT+JWT"))),
        (
            "a claim of somebody else's",
            with("claims", "shop", json!("x")),
        ),
    ]
}

/// Tokens that are not, each with what is wrong.
fn unwelcome() -> Vec<(&'static str, String)> {
    let now = clock::now().timestamp();
    let (header, claims) = good();
    let whole = signed(&header, &claims, Algorithm::HS256, SECRET);
    let (message, signature) = whole.rsplit_once('.').unwrap();
    let (encoded_header, _) = message.split_once('.').unwrap();
    let encode = |part: &Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
    let unsigned = |alg: &str| {
        let header = encode(&json!({"alg": alg, "typ": "at+jwt"}));
        format!("{header}.{}.", encode(&claims))
    };
    let mut promoted = claims.clone();
    promoted["role"] = "admin".into();
    vec![
        ("empty", String::new()),
        ("no token", "nonsense".to_owned()),
        ("not three parts", message.to_owned()),
        ("expired", with("claims", "exp", json!(now - HOUR_SECONDS))),
        ("no expiry", with("claims", "exp", Value::Null)),
        (
            "not valid yet",
            with("claims", "nbf", json!(now + HOUR_SECONDS)),
        ),
        (
            "forged with another key",
            signed(
                &header,
                &claims,
                Algorithm::HS256,
                "another secret, also of 32 bytes",
            ),
        ),
        (
            "forged with an empty key",
            signed(&header, &claims, Algorithm::HS256, ""),
        ),
        (
            "claims of one, signature of another",
            format!("{encoded_header}.{}.{signature}", encode(&promoted)),
        ),
        ("alg none", unsigned("none")),
        ("alg None", unsigned("None")),
        ("alg HS256, no signature", unsigned("HS256")),
        (
            "alg RS256, signed with HS256",
            with("header", "alg", json!("RS256")),
        ),
        ("no alg", with("header", "alg", Value::Null)),
        (
            "alg HS512",
            signed(
                &json!({"alg": "HS512", "typ": "at+jwt"}),
                &claims,
                Algorithm::HS512,
                SECRET,
            ),
        ),
        ("another audience", with("claims", "aud", json!("shop"))),
        ("no audience", with("claims", "aud", Value::Null)),
        ("another issuer", with("claims", "iss", json!("shop"))),
        ("no issuer", with("claims", "iss", Value::Null)),
        ("an ordinary JWT", with("header", "typ", json!("JWT"))),
        ("no type", with("header", "typ", Value::Null)),
        ("no subject", with("claims", "sub", Value::Null)),
        (
            "a subject that is no UUID",
            with("claims", "sub", json!("{p0}")),
        ),
        ("an unknown role", with("claims", "role", json!("root"))),
        ("no role", with("claims", "role", Value::Null)),
        ("an unknown key", with("header", "kid", json!("2"))),
        (
            "an extension that must be understood",
            with("header", "crit", json!(["b64"])),
        ),
    ]
}

#[tokio::test]
async fn only_a_whole_token_buys() {
    let app = App::start().await;
    let sale = app.sale(json!({"allocation": 100})).await;
    let sale = id(&sale);
    let purchase = || {
        app.request(Method::POST, &format!("/v1/sales/{sale}/orders"))
            .header("idempotency-key", "k")
            .json(&json!({"quantity": 1}))
    };
    for (what, token) in welcome() {
        let answer = send(purchase().bearer_auth(token)).await;
        assert_eq!(answer.status, 201, "{what}: {answer:?}");
    }

    let unchanged = Unchanged::since_now(&app, sale).await;
    let refuse = async |what: &str, request: RequestBuilder| {
        let answer = send(request).await;
        assert_eq!(answer.status, 401, "{what}: {answer:?}");
        refused(&answer, "unauthenticated", "same_key", json!({}));
        unchanged.holds(what).await;
        answer.json()["detail"].clone()
    };
    let mut details = Vec::new();
    for (what, token) in unwelcome() {
        details.push(refuse(what, purchase().bearer_auth(token)).await);
    }
    let token = app.token(clock::new_id(), Role::Buyer);
    for (what, header) in [
        ("another scheme", format!("Basic {token}")),
        ("no scheme", token.clone()),
        ("two tokens in one", format!("Bearer {token} {token}")),
    ] {
        details.push(refuse(what, purchase().header("authorization", header)).await);
    }
    let twice = purchase().bearer_auth(&token).bearer_auth(&token);
    details.push(refuse("two tokens", twice).await);
    details.push(refuse("nothing", purchase()).await);
    // Whatever is wrong: it does not help whoever tries.
    details.dedup();
    assert_eq!(details.len(), 1, "{details:?}");
    unchanged.at_the_end().await;
    app.finish().await;
}

#[tokio::test]
async fn every_guarded_route_asks_who_it_is() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let buyer = clock::new_id();
    let order = app.buy(id(&sale), buyer, "k", 1).await.expect(201).json();
    let unchanged = Unchanged::since_now(&app, id(&sale)).await;
    let sale_path = format!("/v1/sales/{}", id(&sale));
    let order_path = format!("/v1/orders/{}", id(&order));
    let product_path = format!("/v1/products/{}", sale["product_id"].as_str().unwrap());
    let of_callers = [
        (Method::GET, "/v1/me".to_owned()),
        (Method::GET, "/v1/orders".to_owned()),
        (Method::GET, order_path.clone()),
        (Method::POST, format!("{order_path}/cancel")),
        (Method::POST, format!("{sale_path}/orders")),
    ];
    let of_operators = [
        (Method::POST, "/v1/products".to_owned()),
        (Method::PATCH, product_path.clone()),
        (Method::DELETE, product_path),
        (Method::POST, "/v1/sales".to_owned()),
        (Method::POST, format!("{sale_path}/pause")),
        (Method::POST, format!("{sale_path}/resume")),
        (Method::POST, format!("{sale_path}/close")),
        (Method::POST, format!("{sale_path}/restock")),
        (Method::GET, format!("{sale_path}/audit")),
    ];
    // Whoever is not known learns nothing, not even whether the rest of the request is right.
    for (method, path) in of_callers.iter().chain(&of_operators) {
        for request in [
            app.request(method.clone(), path),
            app.request(method.clone(), path).bearer_auth("nonsense"),
            app.request(method.clone(), path)
                .json(&json!({"quantity": 1})),
        ] {
            let answer = send(request).await;
            assert_eq!(answer.status, 401, "{method} {path}: {answer:?}");
            refused(&answer, "unauthenticated", "same_key", json!({}));
        }
    }
    let token = app.token(buyer, Role::Buyer);
    for (method, path) in of_operators {
        for body in [json!({}), json!({"units": 1})] {
            let request = app.request(method.clone(), &path).bearer_auth(&token);
            let request = request.header("idempotency-key", "k").json(&body);
            let answer = send(request).await;
            assert_eq!(answer.status, 403, "{method} {path}: {answer:?}");
            refused(&answer, "forbidden", "never", json!({}));
        }
    }
    unchanged.at_the_end().await;

    // An admin may do what an operator may.
    let admin = app.token(Uuid::from_u128(7), Role::Admin);
    let path = format!("{sale_path}/pause");
    send(app.request(Method::POST, &path).bearer_auth(admin))
        .await
        .expect(200);
    app.finish().await;
}
