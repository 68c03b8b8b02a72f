//! Least privilege: each process with a role of its own in PostgreSQL, for the whole life of a sale.

use reqwest::Method;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stockade::{
    app::{self, Role as Does},
    config::{Config, Endpoints},
    lifecycle::Lifecycle,
};
use uuid::Uuid;

use super::support::{
    Postgres,
    app::{App, id, send},
};

/// The same database as somebody else.
fn login(url: &SecretString, role: &str) -> SecretString {
    let mut url = reqwest::Url::parse(url.expose_secret()).unwrap();
    url.set_username(role).unwrap();
    url.set_password(Some("secret")).unwrap();
    url.to_string().into()
}

#[tokio::test]
async fn each_process_has_what_it_needs_and_nothing_more() {
    // Roles are the whole cluster's: one of its own.
    let postgres = Postgres::start(&[]).await;
    let mut app = App::without_node(&[]).await;
    app.database_url = postgres.server.url().clone();
    let mut owner = PgConnection::connect(app.database_url.expose_secret())
        .await
        .unwrap();
    sqlx::raw_sql(include_str!("../../deploy/postgresql-roles.sql"))
        .execute(&mut owner)
        .await
        .unwrap();
    sqlx::raw_sql(
        "CREATE ROLE http LOGIN PASSWORD 'secret' IN ROLE stockade_http;
         CREATE ROLE writer LOGIN PASSWORD 'secret' IN ROLE stockade_writer",
    )
    .execute(&mut owner)
    .await
    .unwrap();

    let config = Config::load(app.environment()).unwrap();
    let mut running = Vec::new();
    for (role, does) in [("writer", Does::Writer), ("http", Does::Http)] {
        let endpoints = Endpoints {
            database_url: login(&app.database_url, role),
            ..app.endpoints()
        };
        let life = Lifecycle::new();
        let started = app::start(&config, &endpoints, &[does], &life)
            .await
            .unwrap();
        if let Some(addr) = started.http_addr {
            app.speak_to(format!("http://{addr}"));
        }
        let ends = life.clone();
        running.push((life, tokio::spawn(async move { ends.run().await.unwrap() })));
    }
    app.ready().await;

    let account =
        json!({ "email": "ada@example.org", "password": "a password of the tests", "name": "Ada" });
    let register = app
        .request(Method::POST, "/v1/auth/register")
        .json(&account);
    send(register).await.expect(201);
    let account = json!({ "email": "ada@example.org", "password": "a password of the tests" });
    let inside = send(app.request(Method::POST, "/v1/auth/login").json(&account))
        .await
        .expect(200)
        .json();
    let refresh = json!({ "refresh_token": inside["refresh_token"] });
    send(app.request(Method::POST, "/v1/auth/refresh").json(&refresh))
        .await
        .expect(200);
    let sale = app.sale(json!({ "hold_seconds": 60 })).await;
    let (sale, buyer) = (id(&sale), Uuid::from_u128(7));
    let bought = app.buy(sale, buyer, "bought", 1).await.expect(201).json();
    let given_back = app
        .buy(sale, buyer, "given-back", 1)
        .await
        .expect(201)
        .json();
    send(
        app.operate(Method::POST, &format!("/v1/orders/{}/pay", id(&bought)))
            .header("Idempotency-Key", "k")
            .json(&json!({})),
    )
    .await;
    send(app.operate(
        Method::POST,
        &format!("/v1/orders/{}/cancel", id(&given_back)),
    ))
    .await
    .expect(200);
    for word in ["pause", "resume", "restock", "close"] {
        let request = app.operate(Method::POST, &format!("/v1/sales/{sale}/{word}"));
        let body = if word == "restock" {
            json!({ "units": 1 })
        } else {
            json!({})
        };
        send(request.header("Idempotency-Key", word).json(&body))
            .await
            .expect(200);
    }
    assert_eq!(app.audit(sale).await["verdict"], "pass");

    // What an intruder in one of them would like to do.
    for (role, forbidden) in [
        (
            "http",
            &[
                "UPDATE orders SET quantity = 1",
                "DELETE FROM orders",
                "INSERT INTO orders SELECT * FROM orders",
                "DELETE FROM round_events",
                "INSERT INTO round_events SELECT * FROM round_events",
                "UPDATE dead_letters SET resolved_at = now()",
                "UPDATE certificates SET jws = ''",
                "UPDATE audit_log SET actor = NULL",
                "UPDATE audit_log_head SET number = 0",
                "INSERT INTO audit_log (action, outcome, number) VALUES ('x', 'done', 1)",
                "ALTER TABLE audit_log DISABLE TRIGGER USER",
                "TRUNCATE products",
                "DROP TABLE carts",
                "CREATE TABLE mine (x int)",
                "DELETE FROM refunds",
                "DELETE FROM erased_users",
                "CREATE OR REPLACE FUNCTION audit_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
                "COPY (SELECT 1) TO PROGRAM 'true'",
            ][..],
        ),
        (
            "writer",
            &[
                "SELECT password_hash FROM users",
                "SELECT hash FROM refresh_tokens",
                "SELECT hash FROM api_keys",
                "UPDATE users SET role = 'admin'",
                "DELETE FROM orders",
                "UPDATE round_events SET units = 0",
                "UPDATE sales SET price_amount = 0",
                "UPDATE payments SET refund_due = 0",
                "INSERT INTO refunds SELECT * FROM refunds",
                "UPDATE audit_log SET actor = NULL",
                "DELETE FROM audit_log",
                "ALTER TABLE audit_log DISABLE TRIGGER USER",
            ][..],
        ),
    ] {
        let url = login(&app.database_url, role);
        let mut sql = PgConnection::connect(url.expose_secret()).await.unwrap();
        for statement in forbidden {
            let refused = sqlx::raw_sql(AssertSqlSafe(*statement))
                .execute(&mut sql)
                .await;
            let refused = refused
                .err()
                .unwrap_or_else(|| panic!("{role} may: {statement}"));
            let code = refused
                .as_database_error()
                .and_then(|error| error.code().map(String::from));
            assert_eq!(
                code.as_deref(),
                Some("42501"),
                "{role}: {statement}: {refused}"
            );
        }
    }
    for (life, running) in running.into_iter().rev() {
        life.stop();
        running.await.unwrap();
    }
    app.abandon().await;
}
