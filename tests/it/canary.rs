//! Secrets with names that can be found again go through every route; then nothing that the server
//! says to anybody else has them: its log, its access log, its metrics, its refusals, the audit log.

use std::fs;

use reqwest::{Client, Method, RequestBuilder};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use stockade::{auth::Role, config::Config};
use tempfile::TempDir;
use uuid::Uuid;

use super::support::{
    app::{Answer, App, id, send, sql},
    process::{Machine, Served, stockade},
};

/// What all of them have, and nothing else.
const CANARY: &str = "canary";

/// The first operator.
const OPERATOR: &str = "canary-operator@example.org";

/// Where a secret may stand that a client sends to the wrong place.
fn astray(path: &str) -> String {
    format!("{path}?access_token=canary-query-token&token=canary-query-token")
}

/// Every operation of the document: its method, and a path that leads to nothing.
fn operations(document: &Value, sale: &str) -> Vec<(Method, String)> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let Ok(method) = method.to_uppercase().parse::<Method>() else {
                continue;
            };
            let mut path = path.clone();
            if path.starts_with("/v1/sales/{id}") {
                path = path.replace("{id}", sale);
            }
            for parameter in ["{id}", "{image}", "{file}", "{reference}", "{gateway}"] {
                path = path.replace(parameter, &Uuid::nil().to_string());
            }
            found.push((method, path.replace("{round}", "1")));
        }
    }
    found
}

/// Right, wrong and malformed requests to one operation.
fn requests(
    node: &str,
    client: &Client,
    method: &Method,
    path: &str,
    tokens: &[String],
) -> Vec<RequestBuilder> {
    let secret = json!({
        "email": "canary-ada@example.org", "password": "canary-password", "name": "Ada canary-name",
        "refresh_token": "canary-refresh-token", "old_password": "canary-password",
        "payment_method": "canary-payment-method", "receipt": "canary-receipt",
    });
    let right_and_more = json!({ "quantity": 1, "canary-field": "canary-value" });
    let bodies = [
        secret.to_string(),
        secret.to_string().replace('}', ", canary"),
        right_and_more.to_string(),
        r#"{"quantity": "canary-quantity", "units": "canary-units", "email": ["canary-email"]}"#
            .to_owned(),
        "canary-text\r\ncanary-line".to_owned(),
    ];
    let mut made = Vec::new();
    for (n, body) in bodies.into_iter().enumerate() {
        let token = &tokens[n % tokens.len()];
        let request = client
            .request(method.clone(), format!("{node}{path}"))
            .bearer_auth(token)
            .header(
                "Content-Type",
                if n == 4 {
                    "text/plain"
                } else {
                    "application/json"
                },
            )
            .header("Idempotency-Key", format!("canary-key-{n}"))
            .header("If-Match", "\"canary-etag\"")
            .header("Cookie", "session=canary-cookie")
            .header("Referer", "https://shop.example/?token=canary-referer")
            .header("Stripe-Signature", "t=1,v1=canary-signature");
        made.push(if *method == Method::GET {
            request
        } else {
            request.body(body)
        });
    }
    made.push(client.request(method.clone(), format!("{node}{}", astray(path))));
    made
}

/// What a refusal quotes of its own request goes back to whoever sent it: not of a secret, though.
fn refusal_is_clean(answer: &Answer, secrets: &[String]) {
    if answer.status.is_client_error() || answer.status.is_server_error() {
        for secret in [
            "canary-password",
            "canary-token",
            "canary-refresh-token",
            "canary-cookie",
            "canary-ada",
        ] {
            assert!(!answer.text.contains(secret), "{}", answer.text);
        }
        for secret in secrets {
            assert!(!answer.text.contains(secret), "{}", answer.text);
        }
    }
}

async fn nothing_of_it_is_told(log_format: &str) {
    let mut app = App::start().await;
    let sale = app.sale(json!({})).await;
    let url = reqwest::Url::parse(app.database_url.expose_secret()).unwrap();
    let database_password = url.password().unwrap().to_owned();
    let url = reqwest::Url::parse(app.redis.server.url().expose_secret()).unwrap();
    let redis_password = url.password().unwrap().to_owned();
    let dir = TempDir::new().unwrap();
    let access_log = dir.path().join("access.log");
    let secrets = [
        ("STOCKADE_OPERATOR_EMAIL", OPERATOR),
        ("STOCKADE_OPERATOR_PASSWORD", "canary-operator-password"),
        ("STOCKADE_STRIPE_SECRET_KEY", "sk_canary_stripe_key"),
        (
            "STOCKADE_STRIPE_WEBHOOK_SECRET",
            "whsec_canary_stripe_webhook",
        ),
        ("STOCKADE_STRIPE_URL", "http://127.0.0.1:9"),
        ("STOCKADE_PAYPAL_CLIENT_ID", "paypal"),
        ("STOCKADE_PAYPAL_CLIENT_SECRET", "canary-paypal-secret"),
        ("STOCKADE_PAYPAL_WEBHOOK_ID", "webhook"),
        ("STOCKADE_PAYPAL_URL", "http://127.0.0.1:9"),
        (
            "STOCKADE_CERTIFICATE_KEY",
            "canary-certificate-key-of-32-bytes",
        ),
        (
            "STOCKADE_RECEIPT_KEYS",
            "9:canary-receipt-key-of-at-least-32-bytes",
        ),
        (
            "STOCKADE_DATA_KEYS",
            "1:canary-data-key-of-at-least-32-bytes",
        ),
        ("STOCKADE_LOG", "debug"),
        ("STOCKADE_LOG_FORMAT", log_format),
        (
            "STOCKADE_ACCESS_LOG",
            if log_format == "text" {
                "combined"
            } else {
                "json"
            },
        ),
        ("STOCKADE_ACCESS_LOG_FILE", access_log.to_str().unwrap()),
        ("STOCKADE_SANDBOX", "on"),
    ];
    for (name, value) in secrets {
        app.set(name, value);
    }
    let mut node = Served::start_on(&app, Machine::default()).await;
    let client = Client::new();
    let at = node.url();

    let account = json!({ "email": "canary-eve@example.org", "password": "canary-eves-password", "name": "canary-eve" });
    let register = client.post(format!("{at}/v1/auth/register")).json(&account);
    send(register).await.expect(201);
    let login = json!({ "email": "canary-eve@example.org", "password": "canary-eves-password" });
    let inside = send(client.post(format!("{at}/v1/auth/login")).json(&login))
        .await
        .expect(200)
        .json();
    let refresh = json!({ "refresh_token": inside["refresh_token"] });
    let pair = send(client.post(format!("{at}/v1/auth/refresh")).json(&refresh))
        .await
        .expect(200)
        .json();
    let held: Vec<String> = [&inside, &pair]
        .into_iter()
        .flat_map(|grant| {
            ["access_token", "refresh_token"].map(|name| grant[name].as_str().unwrap().to_owned())
        })
        .collect();

    let order = json!({ "name": "till", "scopes": ["read", "buy"] });
    let made = client
        .post(format!("{at}/v1/me/api-keys"))
        .bearer_auth(&held[2])
        .json(&order);
    let api_key = send(made).await.expect(201).json()["key"]
        .as_str()
        .unwrap()
        .to_owned();

    let tokens = [
        "canary-bearer-token".to_owned(),
        app.token(Uuid::from_u128(7), Role::Buyer),
        app.token(app.operator, Role::Operator),
        held[2].clone(),
        api_key,
    ];
    let own = [
        database_password,
        redis_password,
        super::support::app::SECRET.to_owned(),
    ];
    let all: Vec<String> = held
        .iter()
        .chain(&tokens[1..])
        .chain(&own)
        .cloned()
        .collect();
    let document = app.get("/openapi.json").await.json();
    let operations = operations(&document, id(&sale));
    assert!(operations.len() > 50, "{}", operations.len());
    for (method, path) in &operations {
        // It never ends.
        if path.ends_with("/events") {
            continue;
        }
        for request in requests(&at, &client, method, path, &tokens) {
            refusal_is_clean(&send(request).await, &all);
        }
    }
    // Sold, so that what happens behind a purchase has happened, too.
    let buy = client
        .post(format!("{at}/v1/sales/{}/orders", id(&sale)))
        .bearer_auth(&tokens[3])
        .header("Idempotency-Key", "canary-order-key")
        .json(&json!({ "quantity": 1 }));
    let sold = send(buy).await;
    assert!(sold.status == 201 || sold.status == 409, "{sold:?}");

    let metrics = send(client.get(format!("{at}/metrics"))).await.text;
    // What somebody prints who looks for a mistake.
    let config = Config::load(app.environment()).unwrap();
    let printed = format!("{config:#?}\n{:#?}", app.endpoints());
    let checked = stockade(&app, &[], &["check-config"]).await;
    assert!(checked.status.success(), "{checked:?}");
    let checked = String::from_utf8_lossy(&[checked.stdout, checked.stderr].concat()).into_owned();
    node.stop().await;
    let log = node.log();
    let lines = fs::read_to_string(&access_log).unwrap();
    assert!(log.contains("DEBUG") || log.contains("debug"), "{log}");
    assert!(lines.lines().count() >= 5 * operations.len() - 10);
    let mut sql = sql(&app).await;
    let audit: String = sqlx::query_scalar("SELECT json_agg(audit_log)::text FROM audit_log")
        .fetch_one(&mut sql)
        .await
        .unwrap();
    for (name, text) in [
        ("log", &log),
        ("access log", &lines),
        ("metrics", &metrics),
        ("audit log", &audit),
        ("the configuration, printed", &printed),
        ("check-config", &checked),
    ] {
        for line in text.lines() {
            // Whose address it is, the configuration says to whoever has it.
            let said = match name {
                "the configuration, printed" | "check-config" => line.replace(OPERATOR, ""),
                _ => line.to_owned(),
            };
            assert!(!said.contains(CANARY), "{name}: {line}");
            for secret in &all {
                assert!(!line.contains(secret), "{name}: {line}");
            }
        }
    }
    if log_format == "json" {
        for line in log.lines().chain(lines.lines()) {
            assert!(serde_json::from_str::<Value>(line).is_ok(), "{line}");
        }
    }
    app.abandon().await;
}

#[tokio::test]
async fn no_secret_is_in_what_the_server_tells_others_as_text() {
    nothing_of_it_is_told("text").await;
}

#[tokio::test]
async fn no_secret_is_in_what_the_server_tells_others_as_json() {
    nothing_of_it_is_told("json").await;
}
