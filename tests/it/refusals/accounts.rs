//! What registering, logging in and staying logged in are refused for.

use serde_json::{Value, json};

use super::{invalid, refused};
use crate::support::app::{Answer, App, send};

async fn post(app: &App, path: &str, body: &Value) -> Answer {
    send(app.request(reqwest::Method::POST, path).json(body)).await
}

#[tokio::test]
async fn accounts_refuse_with_their_documents() {
    let app = App::start().await;
    let ada =
        json!({"email": "ada@example.org", "password": "correct horse battery", "name": "Ada"});
    post(&app, "/v1/auth/register", &ada).await.expect(201);
    let again = json!({"email": "ADA@example.org", "password": "another long one", "name": "Eve"});
    let answer = post(&app, "/v1/auth/register", &again).await;
    refused(&answer, "email_taken", "never", json!({}));

    for (path, body) in [
        (
            "/v1/auth/login",
            json!({"email": "ada@example.org", "password": "another long one"}),
        ),
        (
            "/v1/auth/login",
            json!({"email": "bob@example.org", "password": "another long one"}),
        ),
        ("/v1/auth/refresh", json!({"refresh_token": "made up"})),
    ] {
        let answer = post(&app, path, &body).await;
        refused(&answer, "invalid_credentials", "never", json!({}));
    }

    for (member, value, status) in [
        ("email", json!("ada"), 422),
        ("email", json!(7), 400),
        ("password", json!("short"), 422),
        ("password", json!(null), 400),
        ("name", json!(""), 422),
        ("role", json!("admin"), 400),
    ] {
        let mut body =
            json!({"email": "bob@example.org", "password": "another long one", "name": "Bob"});
        body[member] = value;
        let answer = post(&app, "/v1/auth/register", &body).await;
        invalid(&answer, status, &format!("#/{member}"));
    }
    app.finish().await;
}
