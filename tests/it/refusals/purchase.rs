//! What a purchase is refused for by the rules of its sale, by the state of things, and when
//! Redis is away.

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use stockade::clock;
use uuid::Uuid;

use super::{Unchanged, document, refused, rows};
use crate::support::app::{Answer, App, PATIENCE, id, send};

/// Two clocks of one machine, one of them asked through a socket.
const CLOCKS_APART_MS: i64 = 1_000;

fn text(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

async fn operate(app: &App, sale: &str, action: &str) -> Answer {
    let path = format!("/v1/sales/{sale}/{action}");
    send(app.operate(Method::POST, &path)).await
}

/// The refusal before the window, which says when it opens.
#[track_caller]
fn not_open(answer: &Answer, opens_at: DateTime<Utc>, asked_at: DateTime<Utc>) {
    let starts_in_ms = answer.json()["starts_in_ms"].as_i64().unwrap();
    let earliest = (opens_at - clock::now()).num_milliseconds() - CLOCKS_APART_MS;
    let latest = (opens_at - asked_at).num_milliseconds() + CLOCKS_APART_MS;
    assert!(
        (earliest..=latest).contains(&starts_in_ms),
        "{earliest}..={latest}: {answer:?}"
    );
    let facts = json!({ "opens_at": text(opens_at), "starts_in_ms": starts_in_ms });
    refused(answer, "not_open", "after", facts);
    let wait_seconds: i64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!(
        (starts_in_ms..starts_in_ms + 1000).contains(&(wait_seconds * 1000)),
        "{answer:?}"
    );
}

/// A refusal that a script is sure of for ever, and memory only for the moment.
#[track_caller]
fn refused_by_script_or_memory(answer: &Answer, code: &str) -> bool {
    let from_memory = answer.json()["retry"] == "same_key";
    let retry = if from_memory { "same_key" } else { "never" };
    refused(answer, code, retry, json!({}));
    from_memory
}

#[tokio::test]
async fn the_rules_of_a_sale_refuse_with_their_facts_and_change_nothing() {
    let app = App::start().await;
    let (ada, bob) = (clock::new_id(), clock::new_id());
    let sale = app
        .sale(json!({"allocation": 5, "per_buyer_limit": 4, "per_order_limit": 3}))
        .await;
    let sale = id(&sale);
    app.buy(sale, ada, "first", 3).await.expect(201);

    let unchanged = Unchanged::since_now(&app, sale).await;
    for (buyer, key, quantity, code, facts) in [
        (bob, "b", 4, "order_limit", json!({"limit": 3, "held": 0})),
        (ada, "b", 4, "order_limit", json!({"limit": 3, "held": 3})),
        (ada, "b", 2, "buyer_limit", json!({"limit": 4, "held": 3})),
        (bob, "b", 3, "insufficient", json!({"remaining": 2})),
        (ada, "first", 1, "idempotency_key_mismatch", json!({})),
    ] {
        let answer = app.buy(sale, buyer, key, quantity).await;
        refused(&answer, code, "never", facts);
        unchanged.holds(code).await;
    }
    unchanged.at_the_end().await;

    // A refused key is as good as new.
    app.buy(sale, bob, "b", 2).await.expect(201);
    let unchanged = Unchanged::since_now(&app, sale).await;
    assert_eq!(unchanged.standing["sold_out"], true);
    let late = app.buy(sale, clock::new_id(), "late", 1).await;
    refused(&late, "sold_out", "never", json!({}));
    unchanged.at_the_end().await;
    app.finish().await;
}

#[tokio::test]
async fn outside_its_window_and_while_paused_a_sale_sells_nothing() {
    let app = App::start().await;
    let buyer = clock::new_id();

    let opens_at = DateTime::from_timestamp_millis(4_000_000_000_123).unwrap();
    let scheduled = app.sale(json!({"opens_at": text(opens_at)})).await;
    let unchanged = Unchanged::since_now(&app, id(&scheduled)).await;
    let asked_at = clock::now();
    let answer = app.buy(id(&scheduled), buyer, "k", 1).await;
    not_open(&answer, opens_at, asked_at);
    unchanged.at_the_end().await;

    let paused = app.sale(json!({})).await;
    operate(&app, id(&paused), "pause").await.expect(200);
    let unchanged = Unchanged::since_now(&app, id(&paused)).await;
    let answer = app.buy(id(&paused), buyer, "k", 1).await;
    refused(&answer, "paused", "after", json!({}));
    unchanged.at_the_end().await;
    operate(&app, id(&paused), "resume").await.expect(200);
    app.buy(id(&paused), buyer, "k", 1).await.expect(201);

    let closed = app.sale(json!({})).await;
    operate(&app, id(&closed), "close").await.expect(200);
    let ended = app
        .sale(json!({"closes_at": text(clock::now() + TimeDelta::seconds(1))}))
        .await;
    let path = format!("/v1/sales/{}", id(&ended));
    app.until(&path, |answer| answer.json()["state"] == "closed")
        .await;
    for sale in [closed, ended] {
        let unchanged = Unchanged::since_now(&app, id(&sale)).await;
        let answer = app.buy(id(&sale), buyer, "k", 1).await;
        refused(&answer, "closed", "never", json!({}));
        unchanged.at_the_end().await;
    }
    app.finish().await;
}

/// Refusals that this node gave without asking Redis.
async fn refused_from_memory(app: &App) -> u64 {
    let metrics = app.get("/metrics").await.expect(200).text;
    metrics
        .lines()
        .filter(|line| line.starts_with("stockade_engine_refused_from_memory_total"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

#[tokio::test]
async fn memory_refuses_in_a_form_of_its_own_and_never_an_accepted_key() {
    let app = App::start().await;
    let ada = clock::new_id();
    for code in ["sold_out", "closed"] {
        let sale = app.sale(json!({"allocation": 2})).await;
        let first = app.buy(id(&sale), ada, "k", 2).await.expect(201);
        if code == "closed" {
            operate(&app, id(&sale), "close").await.expect(200);
        }
        let unchanged = Unchanged::since_now(&app, id(&sale)).await;
        let both_forms = async {
            let (mut by_script, mut from_memory) = (0, 0);
            while by_script == 0 || from_memory == 0 {
                let answer = app.buy(id(&sale), clock::new_id(), "k", 1).await;
                if refused_by_script_or_memory(&answer, code) {
                    from_memory += 1;
                } else {
                    by_script += 1;
                }
                let again = app.buy(id(&sale), ada, "k", 2).await.expect(201);
                assert_eq!(again.text, first.text);
                assert_eq!(again.header("idempotency-replayed"), Some("true"));
            }
        };
        tokio::time::timeout(PATIENCE, both_forms).await.unwrap();
        unchanged.at_the_end().await;
    }

    let opens_at = DateTime::from_timestamp_millis(4_000_000_000_123).unwrap();
    let sale = app.sale(json!({"opens_at": text(opens_at)})).await;
    let before = refused_from_memory(&app).await;
    let refused_without_asking = async {
        while refused_from_memory(&app).await == before {
            let asked_at = clock::now();
            let answer = app.buy(id(&sale), ada, "k", 1).await;
            not_open(&answer, opens_at, asked_at);
        }
    };
    tokio::time::timeout(PATIENCE, refused_without_asking)
        .await
        .unwrap();
    app.finish().await;
}

/// One sale of 3 units, at most 2 for a buyer and for an order, and what it answers first.
struct Precedence {
    /// What Ada bought under the key `known` before.
    bought: u64,
    /// What the operator did then.
    then: Option<&'static str>,
    /// Who asks, with which key, for how many.
    ask: (&'static str, &'static str, u64),
    /// The refusal, or `replayed`.
    answer: &'static str,
}

const PRECEDENCE: &[Precedence] = &{
    const fn row(
        bought: u64,
        then: Option<&'static str>,
        ask: (&'static str, &'static str, u64),
        answer: &'static str,
    ) -> Precedence {
        Precedence {
            bought,
            then,
            ask,
            answer,
        }
    }
    const MISMATCH: &str = "idempotency_key_mismatch";
    [
        // A known key before everything.
        row(2, None, ("ada", "known", 2), "replayed"),
        row(2, Some("pause"), ("ada", "known", 2), "replayed"),
        row(2, Some("close"), ("ada", "known", 2), "replayed"),
        row(2, None, ("ada", "known", 1), MISMATCH),
        row(2, None, ("ada", "known", 9), MISMATCH),
        row(2, Some("pause"), ("ada", "known", 1), MISMATCH),
        row(2, Some("close"), ("ada", "known", 1), MISMATCH),
        // The state before the limits and the stock.
        row(0, Some("pause"), ("bob", "new", 9), "paused"),
        row(2, Some("pause"), ("ada", "new", 1), "paused"),
        row(2, Some("pause"), ("bob", "new", 2), "paused"),
        row(0, Some("close"), ("bob", "new", 9), "closed"),
        row(2, Some("close"), ("ada", "new", 1), "closed"),
        row(2, Some("close"), ("bob", "new", 2), "closed"),
        // The limits before the stock, the order's first.
        row(2, None, ("ada", "new", 3), "order_limit"),
        row(2, None, ("bob", "new", 3), "order_limit"),
        row(2, None, ("ada", "new", 2), "buyer_limit"),
        row(2, None, ("ada", "new", 1), "buyer_limit"),
        row(2, None, ("bob", "new", 2), "insufficient"),
    ]
};

#[tokio::test]
async fn the_first_of_several_reasons_refuses() {
    let app = App::start().await;
    let (ada, bob, eve) = (clock::new_id(), clock::new_id(), clock::new_id());
    let rules = json!({"allocation": 3, "per_buyer_limit": 2});
    let check =
        async |sale: &str, ask: (&str, &str, u64), expected: &str, first: Option<&Answer>| {
            let (who, key, quantity) = ask;
            let buyer = if who == "ada" { ada } else { bob };
            let answer = app.buy(sale, buyer, key, quantity).await;
            if expected == "replayed" {
                let answer = answer.expect(201);
                assert_eq!(Some(&answer.text), first.map(|first| &first.text));
                assert_eq!(answer.header("idempotency-replayed"), Some("true"));
            } else {
                assert_eq!(answer.json()["code"], expected, "{ask:?}: {answer:?}");
            }
        };
    for row in PRECEDENCE {
        let sale = app.sale(rules.clone()).await;
        let mut first = None;
        if row.bought > 0 {
            first = Some(
                app.buy(id(&sale), ada, "known", row.bought)
                    .await
                    .expect(201),
            );
        }
        if let Some(action) = row.then {
            operate(&app, id(&sale), action).await.expect(200);
        }
        check(id(&sale), row.ask, row.answer, first.as_ref()).await;
    }

    // With nothing left.
    let sale = app.sale(rules.clone()).await;
    let first = app.buy(id(&sale), ada, "known", 2).await.expect(201);
    app.buy(id(&sale), eve, "last", 1).await.expect(201);
    for (ask, expected) in [
        (("ada", "known", 2), "replayed"),
        (("ada", "known", 1), "idempotency_key_mismatch"),
        (("bob", "new", 3), "order_limit"),
        (("ada", "new", 1), "buyer_limit"),
        (("bob", "new", 2), "sold_out"),
        (("bob", "new", 1), "sold_out"),
    ] {
        check(id(&sale), ask, expected, Some(&first)).await;
    }
    operate(&app, id(&sale), "pause").await.expect(200);
    check(id(&sale), ("bob", "new", 1), "paused", None).await;

    // Before the start a pause does not show yet, but an end is an end.
    let mut early = rules;
    early["opens_at"] = "2099-01-01T00:00:00Z".into();
    let sale = app.sale(early).await;
    for (action, expected) in [
        (None, "not_open"),
        (Some("pause"), "not_open"),
        (Some("close"), "closed"),
    ] {
        if let Some(action) = action {
            operate(&app, id(&sale), action).await.expect(200);
        }
        check(id(&sale), ("bob", "new", 9), expected, None).await;
    }
    app.finish().await;
}

#[tokio::test]
async fn what_is_nobodys_or_somebody_elses_is_not_found() {
    let app = App::start().await;
    let (ada, bob) = (clock::new_id(), clock::new_id());
    let sale = app.sale(json!({})).await;
    let sale = id(&sale);
    let order = app.buy(sale, ada, "k", 1).await.expect(201).json();
    let order = id(&order);
    let unchanged = Unchanged::since_now(&app, sale).await;
    let nobody = Uuid::from_u128(7).to_string();

    let answer = app.buy(&nobody, bob, "k", 1).await;
    refused(&answer, "not_found", "never", json!({}));
    let token = app.token(bob, stockade::auth::Role::Buyer);
    for (method, path) in [
        (Method::GET, format!("/v1/sales/{nobody}")),
        (Method::GET, format!("/v1/sales/{nobody}/leaderboard")),
        (Method::GET, format!("/v1/sales/{nobody}/events")),
        (Method::GET, format!("/v1/sales/{sale}/leaderboard?round=2")),
        (Method::GET, format!("/v1/orders/{nobody}")),
        (Method::POST, format!("/v1/orders/{nobody}/cancel")),
        // Ada's.
        (Method::GET, format!("/v1/orders/{order}")),
        (Method::POST, format!("/v1/orders/{order}/cancel")),
        (Method::GET, "/v1/nowhere".to_owned()),
        (Method::POST, "/nowhere".to_owned()),
    ] {
        let answer = send(app.request(method, &path).bearer_auth(&token)).await;
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
        refused(&answer, "not_found", "never", json!({}));
    }
    for action in ["pause", "resume", "close"] {
        let answer = operate(&app, &nobody, action).await;
        refused(&answer, "not_found", "never", json!({}));
    }
    let path = format!("/v1/sales/{nobody}/audit");
    let answer = send(app.operate(Method::GET, &path)).await;
    refused(&answer, "not_found", "never", json!({}));
    unchanged.at_the_end().await;
    app.finish().await;
}

#[tokio::test]
async fn without_redis_nothing_is_sold_and_with_it_again_by_itself() {
    let mut app = App::start().await;
    let buyer = clock::new_id();
    let sale = app.sale(json!({})).await;
    let sale = id(&sale).to_owned();
    let before = rows(&app, &sale).await;
    app.redis.server.stop().await;

    // The first may have been on its way when the connection broke.
    let answer = app.buy(&sale, buyer, "k", 1).await;
    let outcome = answer.json()["outcome"].as_str().unwrap().to_owned();
    assert!(["not_applied", "unknown"].contains(&outcome.as_str()));
    document(&answer, 503, "unavailable", &outcome, "after", json!({}));

    // Who asks is told, and from then on nothing is sent.
    let answer = app.until("/readyz", |answer| answer.status == 503).await;
    let checks = answer.json()["checks"].clone();
    let redis = json!({"name": "redis", "ok": false, "detail": "does not answer"});
    assert!(checks.as_array().unwrap().contains(&redis), "{checks}");
    refused(&answer, "unavailable", "after", json!({ "checks": checks }));
    app.get("/livez").await.expect(200);
    let view = app.get(&format!("/v1/sales/{sale}")).await;
    for answer in [
        app.buy(&sale, buyer, "k", 1).await,
        operate(&app, &sale, "pause").await,
        view,
    ] {
        refused(&answer, "unavailable", "after", json!({}));
    }

    app.redis.server.restart().await.unwrap();
    let sold = async {
        loop {
            let answer = app.buy(&sale, buyer, "k", 1).await;
            if answer.status == 201 {
                break answer.json();
            }
            assert_eq!(answer.status, 503, "{answer:?}");
            tokio::task::yield_now().await;
        }
    };
    let order: Value = tokio::time::timeout(PATIENCE, sold).await.unwrap();
    assert_eq!(order["seq"], 1, "an attempt before was carried out");
    let after = rows(&app, &sale).await;
    assert_eq!(after, (before.0, before.1 + 1, before.2));
    app.finish().await;
}
