//! Nodes that die at the worst instants: real processes of a test build, ended as by SIGKILL at a
//! fail point (`src/faults.rs`), again and again under load. Only built with the feature `faults`;
//! `make mutants` runs it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use reqwest::{Method, RequestBuilder};
use rustix::process::Signal;
use serde_json::json;
use stockade::{clock, domain::id::OperationId};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    carts::{apart, checkout, fill},
    faults::assert_sold,
    payments::{self, Customer, balance_of},
    rounds_end::{AT_ONCE, Bought, archived, close},
    schedules::{rounds, scheduled, until_rounds},
    selling::{assert_replays, strangers},
    support::{
        app::{Answer, App, PATIENCE, crowd, id, insist, send, sql, try_send},
        history::assert_kept,
        market::Market,
        process::Served,
        seed,
        wire::Wire,
    },
};

const FAIL_POINT: &str = "STOCKADE_FAIL_POINT";
/// Deaths at each point.
const LIVES: usize = 8;
const BUYERS: usize = 16;

/// Buyers who come one after the other and insist on an answer, for as long as they are let.
struct Load {
    buying: JoinSet<Vec<(RequestBuilder, Answer)>>,
    enough: Arc<AtomicBool>,
}

impl Load {
    fn on(app: &Arc<App>, sale: &str, node: &Served) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let mut buying = JoinSet::new();
        for _ in 0..BUYERS {
            let (app, sale, door) = (Arc::clone(app), sale.to_owned(), node.door());
            let enough = Arc::clone(&enough);
            buying.spawn(async move {
                let mut bought = Vec::new();
                while !enough.load(Ordering::Relaxed) {
                    let request = strangers(&app, &sale, 1).remove(0);
                    let again = request.try_clone().unwrap();
                    let answer = insist(request, std::slice::from_ref(&door)).await;
                    bought.push((again, answer.expect(201)));
                }
                bought
            });
        }
        Self { buying, enough }
    }

    async fn end(self) -> Vec<(RequestBuilder, Answer)> {
        self.enough.store(true, Ordering::Relaxed);
        let ended = timeout(PATIENCE, self.buying.join_all()).await;
        ended.unwrap().into_iter().flatten().collect()
    }
}

/// A node on stores of its own, and a sale with more than anybody buys.
async fn shop() -> (App, Served, String) {
    shop_with(&[]).await
}

async fn shop_with(settings: &[(&str, &str)]) -> (App, Served, String) {
    let mut app = App::without_node(settings).await;
    let node = Served::start(&app).await;
    app.speak_to(node.url());
    let sale = app
        .sale(json!({ "allocation": 1_000_000, "per_buyer_limit": 1 }))
        .await;
    let sale = id(&sale).to_owned();
    (app, node, sale)
}

/// Everybody has one order, gets the same bytes again, and nothing else is stored.
async fn settle(mut app: App, mut node: Served, sale: &str, bought: Vec<(RequestBuilder, Answer)>) {
    app.speak_to(node.url());
    let mut answers = Vec::new();
    for (request, first) in bought {
        assert_replays(&send(node.ask(request)).await, &first);
        answers.push(first);
    }
    assert_sold(&app, sale, &answers, answers.len()).await;
    app.finish().await;
    assert!(node.stop().await.success());
}

/// A node under load that dies at `point` in each of its lives.
async fn dies_at(point: &str) {
    let (app, mut node, sale) = shop().await;
    node.stop().await;
    let app = Arc::new(app);
    let load = Load::on(&app, &sale, &node);
    for life in 0..LIVES {
        // Not always at the first chance.
        let when = format!("{point}:{}", 1 + life % 3);
        node.set(FAIL_POINT, Some(&when));
        node.start_to_die().await;
    }
    node.set(FAIL_POINT, None);
    node.start_again().await;
    let bought = load.end().await;
    settle(Arc::into_inner(app).unwrap(), node, &sale, bought).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_dies_before_the_script() {
    dies_at("purchase.before_script").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_dies_after_the_script_and_before_its_answer() {
    dies_at("purchase.after_script").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_dies_before_its_transaction() {
    dies_at("writer.before_begin").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_dies_after_its_rows() {
    dies_at("writer.after_rows").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_dies_before_its_commit() {
    dies_at("writer.before_commit").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_dies_after_its_commit() {
    dies_at("writer.after_commit").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_stands_still_inside_its_transaction_and_the_others_go_on() {
    let (app, node, sale) = shop().await;
    let mut sleeper = Served::start(&app).await;
    sleeper.stop().await;
    sleeper.set(FAIL_POINT, Some("writer.after_rows:3:stall"));
    let app = Arc::new(app);
    let load = Load::on(&app, &sale, &node);
    sleeper.start_to_stall().await;
    // It has the lock of the position; PostgreSQL takes it away from it after a while.
    let mut sql = sql(&app).await;
    let position = "SELECT sum(position)::bigint FROM journal_positions";
    let stood: i64 = sqlx::query_scalar(position)
        .fetch_one(&mut sql)
        .await
        .unwrap();
    let moved = async {
        loop {
            let now: i64 = sqlx::query_scalar(position)
                .fetch_one(&mut sql)
                .await
                .unwrap();
            if now > stood {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, moved).await.unwrap();
    sleeper.signal(Signal::CONT);
    let bought = load.end().await;
    assert!(sleeper.stop().await.success());
    settle(Arc::into_inner(app).unwrap(), node, &sale, bought).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_dies_while_it_makes_a_sale() {
    let (mut app, mut node, sale) = shop().await;
    let product = app.view(&sale).await["product_id"].clone();
    for (turn, point) in ["provision.before_redis", "provision.after_redis"]
        .into_iter()
        .enumerate()
    {
        node.stop().await;
        node.set(FAIL_POINT, Some(point));
        node.start_again().await;
        app.speak_to(node.url());
        let body = json!({
            "product_id": product, "allocation": 3, "per_buyer_limit": 1,
            "opens_at": "2020-01-01T00:00:00Z",
        });
        let make = |app: &App| {
            app.operate(Method::POST, "/v1/sales")
                .header("Idempotency-Key", format!("sale-{turn}"))
                .json(&body)
        };
        let answer = try_send(make(&app)).await;
        assert!(answer.is_err(), "{answer:?}");
        assert!(!node.ended().await.success());
        node.set(FAIL_POINT, None);
        node.start_again().await;
        app.speak_to(node.url());
        let made = send(make(&app)).await.expect(201).json();
        let bought = app
            .buy(id(&made), clock::new_id(), "k", 1)
            .await
            .expect(201);
        assert_eq!(bought.json()["seq"], 1);
        assert_eq!(app.view(id(&made)).await["remaining"], 2);
    }
    assert_eq!(app.pages("/v1/sales").await.len(), 3);
    app.finish().await;
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_dies_while_it_verifies_a_partition() {
    let (mut app, mut node, sale) = shop().await;
    let mut bought = Vec::new();
    for point in ["recovery.after_raise", "recovery.after_install"] {
        for _ in 0..3 {
            app.speak_to(node.url());
            for request in strangers(&app, &sale, 10) {
                let first = send(request.try_clone().unwrap()).await.expect(201);
                bought.push((request, first));
            }
            node.kill().await;
            // Another run of the server, so that there is something to verify.
            app.redis.server.kill().await;
            app.redis.server.restart().await.unwrap();
            node.set(FAIL_POINT, Some(point));
            node.start_to_die().await;
            if point == "recovery.after_raise" {
                node.start_to_die().await;
            }
            node.set(FAIL_POINT, None);
            node.start_again().await;
        }
    }
    settle(app, node, &sale, bought).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_dies_after_every_step_of_the_end_of_a_round() {
    let (mut app, mut node, sale) = shop_with(&AT_ONCE).await;
    // They leave in three calls.
    for _ in 0..3 {
        for answer in crowd(strangers(&app, &sale, 400)).await {
            answer.expect(201);
        }
    }
    let bought = Bought::some(&app, &sale, 3).await;
    close(&app, &sale).await;
    node.kill().await;
    for point in [
        "end.after_settle",
        "end.after_certificate",
        "end.after_archive",
        "end.after_some_left",
        "end.after_some_left:2",
        "end.after_all_left",
    ] {
        node.set(FAIL_POINT, Some(point));
        node.start_to_die().await;
    }
    node.set(FAIL_POINT, None);
    node.start_again().await;
    app.speak_to(node.url());
    let mut sql = sql(&app).await;
    archived(&mut sql, &sale).await;
    for bought in &bought {
        bought.replays(&app, &sale).await;
    }
    let counts: (i64, i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM certificates),
                (SELECT count(*) FROM round_events WHERE kind = 'settle'),
                (SELECT count(*) FROM round_events WHERE kind = 'archive')",
    )
    .fetch_one(&mut sql)
    .await
    .unwrap();
    assert_eq!(counts, (1, 1, 1));
    app.finish().await;
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_hold_ends_once_whoever_dies() {
    let seed = seed();
    println!("repeat with STOCKADE_TEST_SEED={seed}");
    let mut app = App::without_node(&[("STOCKADE_GRACE_SECONDS", "0")]).await;
    let stays = Served::start(&app).await;
    let mut dies = Served::start(&app).await;
    app.speak_to(stays.url());
    let market = Market::found(&app, 1, vec![stays.door(), dies.door()]).await;
    let bustle = market.open(BUYERS, seed);
    dies.stop().await;
    for point in [
        "sweep.after_expiry",
        "sweep.after_offer",
        "confirm.before_script",
        "confirm.after_script",
    ] {
        for pass in 1..=3 {
            dies.set(FAIL_POINT, Some(&format!("{point}:{pass}")));
            dies.start_to_die().await;
        }
        app.redis.server.kill().await;
        app.redis.server.restart().await.unwrap();
    }
    dies.set(FAIL_POINT, None);
    dies.start_again().await;

    // Everything that anybody was told is stored, and orders are held.
    let path = format!("/v1/sales/{}", market.sales[0]);
    let mut wire = Wire::connect(&app.redis).await;
    let emptying = async {
        loop {
            let silence = market.silence().await;
            if market.sells().await {
                assert_eq!(app.audit(&market.sales[0]).await["verdict"], "pass");
                if app.view(&market.sales[0]).await["held"] != 0 {
                    assert_eq!(wire.run(&["FLUSHALL"]).await, "OK");
                    return silence;
                }
            }
        }
    };
    let silence = timeout(PATIENCE, emptying).await.unwrap();
    market.sells_again(&app).await;
    drop(silence);
    app.until(&path, |answer| answer.json()["held"] != 0).await;

    bustle.close().await;
    market.settle(&app).await;
    let sales = &market.sales;
    assert_eq!(app.audit(&sales[0]).await["verdict"], "pass");
    let ends = "SELECT array_agg(DISTINCT status) FROM orders WHERE accepted_as = 'held'";
    let mut sql = sql(&app).await;
    let mut ends: Vec<String> = sqlx::query_scalar(ends).fetch_one(&mut sql).await.unwrap();
    ends.sort();
    assert_eq!(ends, ["cancelled", "confirmed", "expired"]);
    let repeat = format!("STOCKADE_TEST_SEED={seed}");
    assert_kept(&market.recorder, &app, sales, &repeat).await;
    app.finish().await;
    for mut node in [stays, dies] {
        assert!(node.stop().await.success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_dies_after_every_step_of_a_payment() {
    let (mut app, mut node, _) = shop_with(&[("STOCKADE_SANDBOX", "on")]).await;
    let sale = app
        .sale(json!({
            "allocation": 100, "per_buyer_limit": 1, "payment": "sandbox", "hold_seconds": 600,
        }))
        .await;
    let sale = id(&sale).to_owned();
    let mut sold = 0;
    for (point, asks_again) in [
        ("pay.after_intent", true),
        ("pay.after_open", true),
        ("pay.after_authorise", true),
        ("pay.after_confirm", true),
        ("pay.after_capture", true),
        // Nobody asks again: whoever looks next goes on.
        ("pay.after_confirm", false),
        ("pay.after_capture", false),
    ] {
        node.stop().await;
        node.set(FAIL_POINT, Some(point));
        node.start_again().await;
        app.speak_to(node.url());
        let buyer = clock::new_id();
        let order = app.buy(&sale, buyer, "buy", 1).await.expect(201).json();
        let path = format!("/v1/orders/{}", id(&order));
        let paying = |app: &App| {
            app.request(Method::POST, &format!("{path}/pay"))
                .bearer_auth(app.token(buyer, stockade::auth::Role::Buyer))
                .header("Idempotency-Key", "pay")
                .json(&json!({ "payment_method": "sandbox_ok" }))
        };
        let answer = try_send(paying(&app)).await;
        assert!(answer.is_err(), "{point}: {answer:?}");
        assert!(!node.ended().await.success());
        node.set(FAIL_POINT, None);
        node.start_again().await;
        app.speak_to(node.url());
        if asks_again {
            let paid = send(paying(&app)).await.expect(200).json();
            assert_eq!(paid["payment"]["state"], "captured", "{point}");
        }
        app.until(&path, |answer| {
            answer.json()["payment"]["state"] == "captured"
        })
        .await;
        sold += 1;
        assert_eq!(app.view(&sale).await["sold"], sold);

        if point != "pay.after_capture" {
            continue;
        }
        for point in [
            "pay.after_refund_intent",
            "pay.after_units_back",
            "pay.after_refund",
        ] {
            node.stop().await;
            node.set(FAIL_POINT, Some(point));
            node.start_again().await;
            app.speak_to(node.url());
            let buyer = clock::new_id();
            let order = app.buy(&sale, buyer, "buy", 1).await.expect(201).json();
            let path = format!("/v1/orders/{}", id(&order));
            let ask = |app: &App, what: &str, body: serde_json::Value| {
                app.request(Method::POST, &format!("{path}/{what}"))
                    .bearer_auth(app.token(buyer, stockade::auth::Role::Buyer))
                    .header("Idempotency-Key", "pay")
                    .json(&body)
            };
            let body = json!({ "payment_method": "sandbox_ok" });
            send(ask(&app, "pay", body)).await.expect(200);
            let answer = try_send(ask(&app, "cancel", json!({}))).await;
            assert!(answer.is_err(), "{point}: {answer:?}");
            assert!(!node.ended().await.success());
            node.set(FAIL_POINT, None);
            node.start_again().await;
            app.speak_to(node.url());
            send(ask(&app, "cancel", json!({}))).await.expect(200);
            app.until(&path, |answer| {
                answer.json()["payment"]["state"] == "refunded"
            })
            .await;
            assert_eq!(app.view(&sale).await["sold"], sold);
        }
    }
    let mut sql = sql(&app).await;
    let (taken, back): (i64, i64) = sqlx::query_as(
        "SELECT (SELECT sum(captured) FROM sandbox_charges)::bigint,
                (SELECT sum(amount) FROM sandbox_refunds)::bigint",
    )
    .fetch_one(&mut sql)
    .await
    .unwrap();
    assert_eq!(taken - back, sold * 1999);
    app.finish().await;
    assert!(node.stop().await.success());
}

/// Over two partitions, with a node that dies after each step of a checkout: whoever asks again and
/// whoever does not, each cart is bought as a whole or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_cart_is_whole_or_gone_wherever_its_node_dies() {
    let (mut app, mut node, _) = shop_with(&[("STOCKADE_PARTITIONS", "4")]).await;
    let (low, high) = apart(&app).await;
    node.stop().await;
    let mut carts = Vec::new();
    for (point, had_before) in [
        ("checkout.after_row:1", false),
        ("checkout.after_group:1", false),
        ("checkout.after_group:2", false),
        ("checkout.after_end:1", false),
        ("checkout.after_group:1", true),
        ("checkout.after_group:2", true),
        ("checkout.after_withdrawal:1", true),
    ] {
        for asks_again in [true, false] {
            node.set(FAIL_POINT, Some(point));
            node.start_again().await;
            app.speak_to(node.url());
            let buyer = clock::new_id();
            if had_before {
                // The second partition refuses.
                app.buy(id(&high), buyer, "before", 1).await.expect(201);
            }
            fill(&app, buyer, &[(&low, 1), (&high, 1)]).await;
            let answer = try_send(checkout(&app, buyer, "c")).await;
            assert!(answer.is_err(), "{point}: {answer:?}");
            assert!(!node.ended().await.success());
            carts.push((point, had_before, asks_again, buyer));
        }
    }
    node.set(FAIL_POINT, None);
    node.start_again().await;
    app.speak_to(node.url());

    let (mut bought, mut before) = (0, 0);
    for (point, had_before, asks_again, buyer) in carts {
        if asks_again {
            let answer = insist(checkout(&app, buyer, "c"), &[node.door()]).await;
            let whole = answer.status == 201 && !had_before;
            assert!(whole || answer.status == 409, "{point}: {answer:?}");
        } else {
            let checkout = OperationId::derive("checkout", buyer, "c").0;
            app.until(&format!("/v1/checkouts/{checkout}"), |answer| {
                answer.status == 404 || answer.json()["state"] != "pending"
            })
            .await;
        }
        let has = format!("/v1/orders?buyer_id={buyer}&status=confirmed");
        app.audit(id(&low)).await;
        app.audit(id(&high)).await;
        let orders = app.pages(&has).await.len() - usize::from(had_before);
        assert!([0, 2].contains(&orders), "{point}: {orders} of two lines");
        if point == "checkout.after_end:1" {
            assert_eq!(orders, 2, "what was accepted stays");
        }
        bought += orders / 2;
        before += usize::from(had_before);
    }
    assert_eq!(app.view(id(&low)).await["sold"], bought);
    assert_eq!(app.view(id(&high)).await["sold"], bought + before);
    app.finish().await;
    assert!(node.stop().await.success());
}

/// Two orders under one payment, with a node that dies after each step of it, and a second order whose
/// time runs out before anybody is up again, or does not: both are bought and paid, or neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkout_is_paid_as_a_whole_or_not_wherever_its_node_dies() {
    let (mut app, mut node, _) = shop_with(&[("STOCKADE_SANDBOX", "on")]).await;
    let plenty = || json!({ "allocation": 100 });
    let first = payments::sale(&app, 600, plenty()).await;
    let lasts = payments::sale(&app, 600, plenty()).await;
    let lapses = payments::sale(&app, 2, plenty()).await;
    let mut sold = [(&first, 0), (&lasts, 0), (&lapses, 0)];
    for (point, second, whole) in [
        ("pay.after_authorise", 1, true),
        ("confirm.after_script:1", 1, true),
        ("confirm.after_script:2", 1, true),
        ("pay.after_capture", 1, true),
        ("pay.after_authorise", 2, false),
        ("confirm.after_script:1", 2, false),
        // Both were confirmed in time: nothing lapses any more.
        ("confirm.after_script:2", 2, true),
        ("pay.after_void", 2, false),
    ] {
        for asks_again in [true, false] {
            node.stop().await;
            // Of two steps, the one before lets the time run out.
            let dies = if point == "pay.after_void" {
                &["confirm.after_script:1", point][..]
            } else {
                &[point]
            };
            node.set(FAIL_POINT, Some(dies[0]));
            node.start_again().await;
            app.speak_to(node.url());
            let lines = [(first.as_str(), 1), (sold[second].0.as_str(), 1)];
            let customer = Customer::with(&app, &lines).await;
            let answer = try_send(customer.paying(&app, "pay", "sandbox_ok")).await;
            assert!(answer.is_err(), "{point}: {answer:?}");
            assert!(!node.ended().await.success());
            if second == 2 {
                sleep(Duration::from_secs(2)).await;
            }
            for point in &dies[1..] {
                node.set(FAIL_POINT, Some(point));
                node.start_to_die().await;
            }
            node.set(FAIL_POINT, None);
            node.start_again().await;
            app.speak_to(node.url());
            if asks_again {
                let answer = send(customer.paying(&app, "pay", "sandbox_ok")).await;
                let expected = if whole { 200 } else { 409 };
                assert_eq!(answer.status, expected, "{point}: {answer:?}");
            }
            let state = if whole { "captured" } else { "voided" };
            let path = format!("/v1/orders/{}", customer.orders[0]);
            app.until(&path, |answer| answer.json()["payment"]["state"] == state)
                .await;
            let view = customer.view(&app).await;
            for order in view["orders"].as_array().unwrap() {
                assert_eq!(order["status"] == "confirmed", whole, "{point}: {view:#}");
            }
            sold[0].1 += i64::from(whole);
            sold[second].1 += i64::from(whole);
        }
    }
    balance_of(&app, &sold.map(|(sale, sold)| (sale.as_str(), sold))).await;
    app.finish().await;
    assert!(node.stop().await.success());
}

/// A sale that opens every second, made round by round by nodes that die on the way: each window comes
/// once, and each round that there is sells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_dies_while_it_makes_the_rounds_of_a_schedule() {
    let (mut app, mut node, _) = shop().await;
    let schedule = json!({
        "cron": "* * * * * *", "time_zone": "Europe/Berlin", "duration_seconds": 1, "rounds": 900,
    });
    let sale = scheduled(&app, schedule, json!({})).await;
    let sale = id(&sale);
    node.stop().await;
    for pass in 1..=3 {
        for point in [
            "rounds.after_plan",
            "provision.before_redis",
            "provision.after_redis",
        ] {
            node.set(FAIL_POINT, Some(&format!("{point}:{pass}")));
            node.start_to_die().await;
        }
    }
    node.set(FAIL_POINT, None);
    node.start_again().await;
    app.speak_to(node.url());

    let before = rounds(&app, sale).await.len();
    let all = until_rounds(&app, sale, |rounds| rounds.len() >= before + 3).await;
    for (earlier, later) in all.iter().zip(&all[1..]) {
        assert_eq!(earlier["closes_at"], later["opens_at"]);
    }
    let numbers: Vec<_> = all.iter().filter_map(|one| one["round"].as_u64()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let order = app.buy(sale, clock::new_id(), "k", 1).await.expect(201);
    assert!(order.json()["round"].as_u64() > Some(1));
    let twice = "SELECT count(*) FROM (SELECT FROM round_events WHERE kind = 'provision'
                                       GROUP BY sale, round HAVING count(*) > 1) AS twice";
    let twice: i64 = sqlx::query_scalar(twice)
        .fetch_one(&mut sql(&app).await)
        .await
        .unwrap();
    assert_eq!(twice, 0);
    app.finish().await;
    assert!(node.stop().await.success());
}
