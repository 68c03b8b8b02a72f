//! The audit log: what people did is in it, with what it changed, and nobody can change it unseen.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use stockade::auth::Role;
use uuid::Uuid;

use super::support::{
    app::{Answer, App, PATIENCE, id, send, sql},
    process::stockade,
};

const REQUEST_ID: &str = "x-request-id";

fn read(app: &App, query: &str) -> RequestBuilder {
    let admin = app.token(Uuid::from_u128(1), Role::Admin);
    app.request(Method::GET, &format!("/v1/audit-log?limit=100&{query}"))
        .bearer_auth(admin)
}

/// The rows that a query finds, once there are so many.
async fn rows(app: &App, query: &str, count: usize) -> Vec<Value> {
    let asking = async {
        loop {
            let page = send(read(app, query)).await.expect(200).json();
            let rows = page["data"].as_array().unwrap().clone();
            if rows.len() >= count {
                return rows;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, asking).await;
    found.unwrap_or_else(|_| panic!("{query}: fewer than {count} rows"))
}

/// The rows of the request that got this answer, oldest first.
async fn of(app: &App, answer: &Answer, count: usize) -> Vec<Value> {
    let request = answer.header(REQUEST_ID).unwrap();
    let mut rows = rows(app, &format!("request_id={request}"), count).await;
    rows.sort_by_key(|row| row["id"].as_i64());
    rows
}

async fn change(app: &App, method: Method, path: &str, version: u32, body: Value) -> Answer {
    let request = app.operate(method, path).json(&body);
    send(request.header("If-Match", format!("\"{version}\""))).await
}

#[tokio::test]
async fn what_operators_change_is_there_with_before_and_after() {
    let app = App::start().await;
    let operator = json!(app.operator);
    let product =
        json!({ "name": "Lamp", "description": "", "price": { "amount": 1, "currency": "EUR" } });
    let made = send(app.operate(Method::POST, "/v1/products").json(&product)).await;
    let product = made.json();
    let noted = of(&app, &made.expect(201), 2).await;
    let row = &noted[0];
    assert_eq!(row["action"], "products.insert");
    assert_eq!(
        (&row["actor"], &row["role"]),
        (&operator, &json!("operator"))
    );
    assert_eq!(
        (&row["target"], &row["outcome"]),
        (&product["id"], &json!("done"))
    );
    assert_eq!(
        (&row["before"], &row["after"]["name"]),
        (&Value::Null, &json!("Lamp"))
    );
    assert_eq!(row["client"], "127.0.0.1");
    let asked = &noted[1];
    assert_eq!(
        (&asked["action"], &asked["outcome"]),
        (&json!("products_create"), &json!("done"))
    );

    let path = format!("/v1/products/{}", id(&product));
    let dearer = json!({ "price": { "amount": 7, "currency": "EUR" } });
    let changed = change(&app, Method::PATCH, &path, 1, dearer.clone())
        .await
        .expect(200);
    let noted = of(&app, &changed, 2).await;
    assert_eq!(
        noted[0]["before"],
        json!({ "price_amount": 1, "version": 1 })
    );
    assert_eq!(
        noted[0]["after"],
        json!({ "price_amount": 7, "version": 2 })
    );
    assert_eq!(noted[1]["target"], product["id"]);
    // What was refused changed nothing, and was asked for.
    let stale = change(&app, Method::PATCH, &path, 1, dearer)
        .await
        .expect(412);
    let noted = of(&app, &stale, 1).await;
    assert_eq!(noted.len(), 1);
    assert_eq!(noted[0]["outcome"], "precondition_failed");
    let gone = change(&app, Method::DELETE, &path, 2, json!(null)).await;
    let noted = of(&app, &gone.expect(204), 2).await;
    assert_eq!(noted[0]["action"], "products.delete");
    assert_eq!(
        (&noted[0]["before"]["name"], &noted[0]["after"]),
        (&json!("Lamp"), &Value::Null)
    );

    // What a script decides comes with the journal, whoever asked for it.
    let sale = app.sale(json!({ "per_buyer_limit": 5 })).await;
    let sale = id(&sale);
    let buyer = Uuid::from_u128(7);
    let order = app.buy(sale, buyer, "k", 1).await.expect(201).json();
    let own = app.buy(sale, buyer, "own", 1).await.expect(201).json();
    for (word, body) in [
        ("pause", json!({})),
        ("resume", json!({})),
        ("restock", json!({ "units": 3 })),
        ("reduce", json!({ "units": 1 })),
    ] {
        let request = app.operate(Method::POST, &format!("/v1/sales/{sale}/{word}"));
        let asked = send(request.header("Idempotency-Key", word).json(&body)).await;
        let asked = of(&app, &asked.expect(200), 1).await;
        assert_eq!(asked[0]["action"], format!("sales_{word}"));
        assert_eq!(asked[0]["target"], sale);
        let event = rows(&app, &format!("target={sale}&action=round.{word}"), 1).await;
        assert_eq!(event[0]["actor"], operator);
        assert_eq!(event[0]["target"], format!("{sale}/1"));
    }
    let restocked = rows(&app, &format!("target={sale}&action=round.restock"), 1).await;
    assert_eq!(restocked[0]["before"]["allocation"], 5);
    assert_eq!(restocked[0]["after"]["units"], 3);

    let cancel = |order: &Value| format!("/v1/orders/{}/cancel", id(order));
    send(
        app.request(Method::POST, &cancel(&own))
            .bearer_auth(app.token(buyer, Role::Buyer)),
    )
    .await
    .expect(200);
    let cancelled = send(app.operate(Method::POST, &cancel(&order)))
        .await
        .expect(200);
    assert_eq!(of(&app, &cancelled, 1).await[0]["action"], "orders_cancel");
    let close = send(app.operate(Method::POST, &format!("/v1/sales/{sale}/close"))).await;
    close.expect(200);
    rows(&app, &format!("target={sale}&action=round.close"), 1).await;
    let all = rows(&app, &format!("target={sale}"), 1).await;
    let given_back: Vec<_> = all
        .iter()
        .filter(|row| row["action"] == "round.cancel")
        .collect();
    // The buyer's own is nobody's business here.
    assert_eq!(given_back.len(), 1);
    assert_eq!(given_back[0]["after"]["order_id"], order["id"]);
    assert_eq!(given_back[0]["actor"], operator);
    app.finish().await;
}

#[tokio::test]
async fn logins_and_refusals_are_there_and_nothing_that_names_a_person() {
    let app = App::start().await;
    let (email, password) = ("ada.canary@example.org", "a canary of a password");
    let body = json!({ "email": email, "password": password, "name": "Ada Canary" });
    let registered = send(app.request(Method::POST, "/v1/auth/register").json(&body)).await;
    let user = registered.json()["id"].clone();
    let noted = of(&app, &registered.expect(201), 2).await;
    assert_eq!(
        (&noted[0]["action"], &noted[0]["target"]),
        (&json!("users.insert"), &user)
    );
    assert_eq!(noted[0]["after"]["role"], "buyer");

    let login = async |email: &str, password: &str| {
        let body = json!({ "email": email, "password": password });
        send(app.request(Method::POST, "/v1/auth/login").json(&body)).await
    };
    let inside = login(email, password).await.expect(200);
    let noted = of(&app, &inside, 1).await;
    assert_eq!(
        (&noted[0]["actor"], &noted[0]["outcome"]),
        (&user, &json!("done"))
    );
    let (account, session) = (noted[0]["target"].clone(), noted[0]["credential"].clone());
    assert!(session.is_string());

    let refused = login(email, "another password").await.expect(401);
    let noted = of(&app, &refused, 1).await;
    assert_eq!(noted[0]["outcome"], "invalid_credentials");
    // The same account and only the client's network: many of them are one row.
    assert_eq!(noted[0]["target"], account);
    assert_eq!(
        (&noted[0]["actor"], &noted[0]["client"]),
        (&Value::Null, &json!("127.0.0.0/24"))
    );
    for _ in 0..5 {
        login(email, "another password").await.expect(401);
    }
    let other = login("nobody@example.org", "another password")
        .await
        .expect(401);
    assert_ne!(of(&app, &other, 1).await[0]["target"], account);
    let refused = rows(&app, "action=accounts_login&outcome=invalid_credentials", 2).await;
    assert_eq!(refused.len(), 2, "{refused:#?}");

    // Only admins read it, and whoever tries is in it.
    let buyer = app.token(Uuid::from_u128(7), Role::Buyer);
    for request in [
        app.operate(Method::GET, "/v1/audit-log"),
        app.request(Method::GET, "/v1/audit-log")
            .bearer_auth(&buyer),
    ] {
        let denied = send(request).await.expect(403);
        assert_eq!(of(&app, &denied, 1).await[0]["outcome"], "forbidden");
    }
    let anonymous = send(app.request(Method::POST, "/v1/products").json(&json!({}))).await;
    let noted = of(&app, &anonymous.expect(401), 1).await;
    assert_eq!(noted[0]["outcome"], "unauthenticated");
    let forged = app
        .request(Method::GET, "/v1/sales/%0Ax%22/audit")
        .bearer_auth(&buyer);
    let noted = of(&app, &send(forged).await.expect(403), 1).await;
    assert_eq!(noted[0]["target"], "%0Ax%22");

    let mut sql = sql(&app).await;
    let all: String = sqlx::query_scalar("SELECT json_agg(audit_log)::text FROM audit_log")
        .fetch_one(&mut sql)
        .await
        .unwrap();
    for secret in ["canary", "Canary", "another password", "nobody@"] {
        assert!(!all.contains(secret), "{secret}");
    }
    app.finish().await;
}

#[tokio::test]
async fn a_change_by_hand_is_there_with_the_role_that_made_it() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let mut sql = sql(&app).await;
    sql.execute("UPDATE sales SET name = 'Free lamps'")
        .await
        .unwrap();
    let by_hand = rows(
        &app,
        &format!("target={}&action=sales.update", id(&sale)),
        1,
    )
    .await;
    assert_eq!(by_hand[0]["role"], "postgresql:stockade");
    assert_eq!(by_hand[0]["after"], json!({ "name": "Free lamps" }));
    app.finish().await;
}

/// Waits until every row has its place in the chain.
async fn chained(sql: &mut PgConnection) {
    loop {
        let waiting: bool =
            sqlx::query_scalar("SELECT EXISTS (SELECT FROM audit_log WHERE number IS NULL)")
                .fetch_one(&mut *sql)
                .await
                .unwrap();
        if !waiting {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// What the verifier says, and with which code it ends.
async fn verdict(app: &App, words: &[&str]) -> (String, i32) {
    let output = stockade(app, &[], &[&["audit-log", "verify"], words].concat()).await;
    let said = String::from_utf8(output.stdout).unwrap();
    (said, output.status.code().unwrap())
}

#[tokio::test]
async fn two_nodes_make_one_chain_and_whoever_tampers_with_it_is_named() {
    let mut app = App::start().await;
    let second = app.node().await;
    for round in 0..5 {
        let product = json!({ "name": format!("Lamp {round}"), "description": "", "price": { "amount": 1, "currency": "EUR" } });
        let request = || app.operate(Method::POST, "/v1/products").json(&product);
        let (one, other) = tokio::join!(send(request()), send(second.ask(request())));
        one.expect(201);
        other.expect(201);
    }
    let mut sql = sql(&app).await;
    rows(&app, "action=products_create", 10).await;
    chained(&mut sql).await;
    second.stop().await;
    app.stop().await;
    chained(&mut sql).await;
    let (whole, code) = verdict(&app, &[]).await;
    assert_eq!(code, 0, "{whole}");
    let head = whole.trim().rsplit_once(' ').unwrap().1.to_owned();
    let last: i64 = head.split_once(':').unwrap().0.parse().unwrap();
    assert!(last >= 20, "{whole}");
    assert_eq!(verdict(&app, &["--head", &head]).await.1, 0);

    // Nobody changes it in passing, not even its owner.
    for statement in [
        "UPDATE audit_log SET actor = NULL WHERE number = 3",
        "UPDATE audit_log SET number = NULL, previous = NULL, hash = NULL WHERE number = 3",
        "DELETE FROM audit_log WHERE number = 3",
        "TRUNCATE audit_log",
    ] {
        let refused = sql.execute(statement).await.unwrap_err();
        assert!(refused.to_string().contains("only added to"), "{refused}");
    }
    sql.execute("SET session_replication_role = replica")
        .await
        .unwrap();
    sql.execute("DELETE FROM audit_log").await.unwrap_err();
    sql.execute("RESET session_replication_role").await.unwrap();

    // Whoever takes the step is found out.
    sql.execute("CREATE TABLE kept AS SELECT * FROM audit_log")
        .await
        .unwrap();
    sql.execute("CREATE TABLE kept_head AS SELECT * FROM audit_log_head")
        .await
        .unwrap();
    sql.execute("ALTER TABLE audit_log DISABLE TRIGGER USER")
        .await
        .unwrap();
    let cut = format!("DELETE FROM audit_log WHERE number > {}", last - 2);
    let both_cut = format!(
        "{cut}; UPDATE audit_log_head SET number = last.number, hash = last.hash
         FROM audit_log AS last WHERE last.number = {}",
        last - 2
    );
    let removed = format!("rows {} to {last} are missing", last - 1);
    for (tampering, words, found) in [
        (
            "UPDATE audit_log SET actor = gen_random_uuid() WHERE number = 3",
            &[][..],
            "row 3 ",
        ),
        (
            "UPDATE audit_log SET after = after || '{\"price_amount\": 2}' WHERE number = (SELECT min(number) FROM audit_log WHERE after IS NOT NULL)",
            &[],
            "was changed",
        ),
        (
            "DELETE FROM audit_log WHERE number IN (4, 5)",
            &[],
            "rows 4 to 5 are missing",
        ),
        (
            "UPDATE audit_log SET number = -number + 1000 WHERE number IN (6, 7);
             UPDATE audit_log SET number = 13 - (1000 - number) WHERE number > 900",
            &[],
            "row 6 ",
        ),
        (
            "INSERT INTO audit_log (action, outcome, number, previous, hash)
             SELECT 'sales_pause', 'done', number + 1, hash, sha256(hash) FROM audit_log_head",
            &[],
            "stands behind the end",
        ),
        (&cut, &[], &removed),
        // The head goes along: only the one that was noted elsewhere tells.
        (&both_cut, &["--head", &head], &removed),
    ] {
        sqlx::raw_sql(AssertSqlSafe(tampering))
            .execute(&mut sql)
            .await
            .unwrap();
        let (said, code) = verdict(&app, words).await;
        assert_eq!(code, 2, "{tampering}: {said}");
        assert!(
            said.starts_with("BROKEN: ") && said.contains(found),
            "{tampering}: {said}"
        );
        sqlx::raw_sql(
            "DELETE FROM audit_log; INSERT INTO audit_log OVERRIDING SYSTEM VALUE SELECT * FROM kept;
             DELETE FROM audit_log_head; INSERT INTO audit_log_head SELECT * FROM kept_head",
        )
        .execute(&mut sql)
        .await
        .unwrap();
    }
    assert_eq!(verdict(&app, &["--head", &head]).await.1, 0);
    let listed = stockade(
        &app,
        &[],
        &["audit-log", "list", "--action", "products.insert"],
    )
    .await;
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert_eq!(listed.lines().count(), 10, "{listed}");
    app.abandon().await;
}

#[tokio::test]
async fn an_event_is_there_although_its_node_died_before_it_could_say_so() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    // As a node that dies behind its script: nobody but the journal knows.
    let operator = Uuid::from_u128(99);
    let engine = &app.shop().engines.all()[0];
    let facts = app
        .shop()
        .directory
        .by_id(stockade::domain::id::SaleId(id(&sale).parse().unwrap()));
    let round = facts.await.unwrap().unwrap().round_id();
    engine
        .control(round, stockade::domain::round::Intent::Paused, operator)
        .await
        .unwrap();
    let event = rows(&app, &format!("actor={operator}"), 1).await;
    assert_eq!(event[0]["action"], "round.pause");
    app.finish().await;
}
