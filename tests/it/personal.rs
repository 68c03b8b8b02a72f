//! What names a person: encrypted if there are keys, told to that person, and erased.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection};
use stockade::auth::Role;
use uuid::Uuid;

use super::{
    holds::join,
    support::{
        app::{Answer, App, id, send, sql},
        process::stockade,
    },
};

const PASSWORD: &str = "a password of the tests";
const OLD: &str = "1:an old secret of thirty-two bytes";
const NEW: &str = "2:a new secret of thirty-two bytes.";

async fn post(app: &App, path: &str, body: &Value) -> Answer {
    send(app.request(Method::POST, path).json(body)).await
}

async fn register(app: &App, email: &str) -> Answer {
    let body = json!({ "email": email, "password": PASSWORD, "name": format!("Name of {email}") });
    post(app, "/v1/auth/register", &body).await
}

/// The access token of a login.
async fn login(app: &App, email: &str) -> String {
    let body = json!({ "email": email, "password": PASSWORD });
    let inside = post(app, "/v1/auth/login", &body).await.expect(200).json();
    inside["access_token"].as_str().unwrap().to_owned()
}

/// Everything that PostgreSQL has.
async fn dump(sql: &mut PgConnection) -> String {
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
            .fetch_all(&mut *sql)
            .await
            .unwrap();
    assert!(tables.len() > 30);
    let mut all = String::new();
    for table in tables {
        let rows = format!("SELECT coalesce(json_agg(t)::text, '') FROM {table} AS t");
        let rows: String = sqlx::query_scalar(AssertSqlSafe(rows))
            .fetch_one(&mut *sql)
            .await
            .unwrap();
        all.push_str(&rows);
    }
    all
}

/// Has every user stored as these keys say.
async fn rotate(app: &App, keys: &str) -> String {
    let output = stockade(
        app,
        &[("STOCKADE_DATA_KEYS", keys)],
        &["data-keys", "rotate"],
    )
    .await;
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

async fn restart(app: &mut App, keys: &str) {
    app.stop().await;
    app.set("STOCKADE_DATA_KEYS", keys);
    app.run().await;
}

#[tokio::test]
async fn users_are_encrypted_with_keys_that_change_and_log_in_all_the_time() {
    let mut app = App::start().await;
    let mut sql = sql(&app).await;
    register(&app, "ada@example.org").await.expect(201);
    assert!(dump(&mut sql).await.contains("ada@example.org"));

    // What is new is encrypted, what was there is not yet.
    restart(&mut app, OLD).await;
    register(&app, "eve@example.org").await.expect(201);
    let all = dump(&mut sql).await;
    assert!(all.contains("ada@example.org") && !all.contains("eve@"));
    let everybody = async |app: &App| {
        for email in ["ada@example.org", "eve@example.org"] {
            let me = app
                .request(Method::GET, "/v1/me")
                .bearer_auth(login(app, email).await);
            let me = send(me).await.expect(200).json();
            assert_eq!(
                (&me["email"], &me["name"]),
                (&json!(email), &json!(format!("Name of {email}")))
            );
            assert_eq!(
                register(app, &format!(" {}", email.to_uppercase()))
                    .await
                    .expect(409)
                    .json()["code"],
                "email_taken"
            );
        }
    };
    everybody(&app).await;

    assert!(rotate(&app, OLD).await.starts_with("1 users"));
    assert!(rotate(&app, OLD).await.starts_with("0 users"));
    everybody(&app).await;
    for plain in ["ada@", "eve@", "Name of"] {
        assert!(!dump(&mut sql).await.contains(plain), "{plain}");
    }

    // Another key, first known, then used; the old one goes when nothing needs it.
    let (known, used) = (format!("{OLD},{NEW}"), format!("{NEW},{OLD}"));
    restart(&mut app, &known).await;
    everybody(&app).await;
    restart(&mut app, &used).await;
    everybody(&app).await;
    for (keys, missing) in [
        (NEW, "1"),
        ("", "1"),
        ("1:another secret of thirty-two byte", "1"),
    ] {
        let output = stockade(&app, &[("STOCKADE_DATA_KEYS", keys)], &["serve"]).await;
        let said = String::from_utf8(output.stderr).unwrap();
        let line =
            format!("users are encrypted with key {missing}, which STOCKADE_DATA_KEYS lacks");
        assert!(
            !output.status.success() && said.contains(&line),
            "{keys}: {said}"
        );
    }
    assert!(rotate(&app, &used).await.starts_with("2 users"));
    restart(&mut app, NEW).await;
    everybody(&app).await;

    // And off again.
    let off = format!("plain,{NEW}");
    restart(&mut app, &off).await;
    everybody(&app).await;
    assert!(rotate(&app, &off).await.starts_with("2 users"));
    restart(&mut app, "").await;
    everybody(&app).await;
    app.finish().await;
}

#[tokio::test]
async fn a_user_is_forgotten_and_what_was_bought_stays() {
    let app = App::start().await;
    let email = "canary-ada@example.org";
    let user = register(&app, email).await.expect(201).json()["id"].clone();
    let token = login(&app, email).await;
    let own = |method, path: &str| app.request(method, path).bearer_auth(&token);
    let shown = json!({ "display_name": "Canary Ada", "show_on_leaderboards": true });
    send(own(Method::PATCH, "/v1/me").json(&shown))
        .await
        .expect(200);
    let sale = app.sale(json!({})).await;
    let held = app.sale(json!({ "hold_seconds": 600 })).await;
    let buy = async |sale: &Value| {
        let request = own(Method::POST, &format!("/v1/sales/{}/orders", id(sale)));
        let request = request
            .header("Idempotency-Key", "k")
            .json(&json!({ "quantity": 1 }));
        send(request).await.expect(201).json()
    };
    let (bought, waits) = (buy(&sale).await, buy(&held).await);
    for order in [&bought, &waits] {
        app.until(&format!("/v1/orders/{}", id(order)), |answer| {
            answer.json()["stored"] == true
        })
        .await;
    }

    let export = send(own(Method::GET, "/v1/me/export"))
        .await
        .expect(200)
        .json();
    assert_eq!(export["account"]["email"], email);
    assert_eq!(export["profile"]["display_name"], "Canary Ada");
    assert_eq!(export["sessions"].as_array().unwrap().len(), 1);
    assert_eq!(export["orders"].as_array().unwrap().len(), 2);
    let kept = export["orders"].as_array().unwrap();
    let kept = kept
        .iter()
        .find(|order| order["id"] == bought["id"])
        .unwrap();
    assert_eq!(
        (&kept["accepted_at"], &kept["unit_price"]),
        (&bought["accepted_at"], &bought["unit_price"])
    );

    let erase = async |password: &str| {
        send(own(Method::DELETE, "/v1/me").json(&json!({ "password": password }))).await
    };
    erase("another password").await.expect(401);
    let refused = erase(PASSWORD).await.expect(409).json();
    assert!(
        refused["detail"]
            .as_str()
            .unwrap()
            .contains("wait for their payment"),
        "{refused}"
    );
    let cancel = own(Method::POST, &format!("/v1/orders/{}/cancel", id(&waits)));
    send(cancel).await.expect(200);
    app.until(
        &format!("/v1/orders?status=cancelled&sale_id={}", id(&held)),
        |answer| {
            answer.json()["data"]
                .as_array()
                .is_some_and(|rows| rows.len() == 1)
        },
    )
    .await;
    let before = app.view(id(&sale)).await;
    erase(PASSWORD).await.expect(204);

    // Nobody comes in any more, nobody is told anything, and the address is free.
    let refused = send(own(Method::GET, "/v1/me/export")).await;
    assert!(
        refused.status == 401 || refused.status == 404,
        "{refused:?}"
    );
    let body = json!({ "email": email, "password": PASSWORD });
    post(&app, "/v1/auth/login", &body).await.expect(401);
    let outside = app.token(user.as_str().unwrap().parse().unwrap(), Role::Buyer);
    let export = app
        .request(Method::GET, "/v1/me/export")
        .bearer_auth(outside);
    send(export).await.expect(404);
    let mut sql = sql(&app).await;
    let all = dump(&mut sql).await;
    for name in ["canary-ada", "Canary Ada"] {
        assert!(!all.contains(name), "{name}");
    }
    assert!(all.contains(user.as_str().unwrap()));

    // What was bought is as it was.
    let after = app.view(id(&sale)).await;
    for counter in ["remaining", "sold", "seq"] {
        assert_eq!(before[counter], after[counter]);
    }
    let board = app
        .pages(&format!("/v1/sales/{}/leaderboard", id(&sale)))
        .await;
    assert_eq!(board.len(), 1);
    let order = send(app.operate(Method::GET, &format!("/v1/orders/{}", id(&bought)))).await;
    assert_eq!(order.expect(200).json()["buyer_id"], user);
    let again = register(&app, email).await.expect(201).json();
    assert_ne!(again["id"], user);
    // An admin does it for whoever cannot.
    let admin = app.token(Uuid::from_u128(1), Role::Admin);
    let erase = || {
        app.request(Method::POST, &format!("/v1/users/{}/erase", id(&again)))
            .bearer_auth(&admin)
    };
    send(erase()).await.expect(204);
    send(erase()).await.expect(404);
    assert!(!dump(&mut sql).await.contains(email));
    let other = app.token(Uuid::from_u128(5), Role::Buyer);
    let nobody = app
        .request(Method::DELETE, "/v1/me")
        .bearer_auth(other)
        .json(&json!({}));
    send(nobody).await.expect(404);
    app.finish().await;
}

#[tokio::test]
async fn whoever_is_forgotten_waits_in_no_line() {
    let app = App::start().await;
    let terms = json!({
        "allocation": 1, "per_buyer_limit": 1, "hold_seconds": 600, "waitlist": true,
    });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let [owner, next] = [1, 2].map(Uuid::from_u128);
    let bought = app.buy(sale, owner, "k", 1).await.expect(201).json();
    let email = "ada@example.org";
    let ada = register(&app, email).await.expect(201).json();
    let token = login(&app, email).await;
    let ada: Uuid = id(&ada).parse().unwrap();
    for buyer in [ada, next] {
        send(join(&app, buyer, sale, 1, "w")).await.expect(200);
    }
    assert_eq!(app.view(sale).await["waiting"], 2);
    let erase = app.request(Method::DELETE, "/v1/me").bearer_auth(token);
    send(erase.json(&json!({ "password": PASSWORD })))
        .await
        .expect(204);
    assert_eq!(app.view(sale).await["waiting"], 1);

    // What comes back is for whoever still waits.
    let cancel = format!("/v1/orders/{}/cancel", id(&bought));
    send(app.operate(Method::POST, &cancel)).await.expect(200);
    let given = format!("/v1/orders?buyer_id={next}&status=held");
    app.until(&given, |answer| answer.json()["data"] != json!([]))
        .await;
    app.finish().await;
}
