//! Sales that open again and again: each window is one round, exactly once, whoever is there.

use std::{collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use stockade::clock;
use tokio::{task::JoinSet, time::sleep};

use super::support::app::{Answer, App, PATIENCE, id, redirected, send, sql};

/// So many milliseconds from now, as the API writes instants.
fn after(ms: i64) -> String {
    text(clock::now() + TimeDelta::milliseconds(ms))
}

fn text(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// A schedule of windows that begin so many milliseconds from now and last so long, one after the
/// other.
fn back_to_back(count: i64, begins_ms: i64, lasts_ms: i64) -> Value {
    let begin = clock::now() + TimeDelta::milliseconds(begins_ms);
    let at = |n: i64| text(begin + TimeDelta::milliseconds(n * lasts_ms));
    let windows = (0..count).map(|n| json!({ "opens_at": at(n), "closes_at": at(n + 1) }));
    json!({ "windows": windows.collect::<Vec<_>>() })
}

/// A sale with a schedule.
pub(crate) async fn scheduled(app: &App, schedule: Value, terms: Value) -> Value {
    let product = json!({
        "name": "Lamp", "description": "", "price": { "amount": 1999, "currency": "EUR" },
    });
    let product = app.operate(Method::POST, "/v1/products").json(&product);
    let product = send(product).await.expect(201).json();
    let mut body = json!({
        "product_id": product["id"], "allocation": 5, "per_buyer_limit": 1, "schedule": schedule,
    });
    let members = terms.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(members);
    send(app.operate(Method::POST, "/v1/sales").json(&body))
        .await
        .expect(201)
        .json()
}

pub(crate) async fn rounds(app: &App, sale: &str) -> Vec<Value> {
    app.pages(&format!("/v1/sales/{sale}/rounds")).await
}

/// Waits until the sale's rounds are as wanted.
pub(crate) async fn until_rounds(
    app: &App,
    sale: &str,
    wanted: impl Fn(&[Value]) -> bool,
) -> Vec<Value> {
    let asking = async {
        loop {
            let rounds = rounds(app, sale).await;
            if wanted(&rounds) {
                return rounds;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap()
}

fn states(rounds: &[Value]) -> Vec<&str> {
    let states = rounds.iter().map(|round| round["state"].as_str().unwrap());
    states.collect()
}

/// A client that wants one unit of some round: it goes on with the same key until it has it, or the
/// sale is over. After `sold_out` it waits for the next round, as `not_open` says.
async fn persist(app: &App, url: &str, sale: &str, key: &str) -> Option<Answer> {
    let buyer = clock::new_id();
    loop {
        let request = app.purchase(sale, buyer, key, r#"{"quantity": 1}"#);
        let answer = send(redirected(request, url)).await;
        if answer.status == 201 {
            return Some(answer);
        }
        match answer.json()["code"].as_str().unwrap() {
            "closed" => return None,
            "not_open" | "sold_out" => {}
            other => panic!("{other}: {answer:?}"),
        }
        sleep(Duration::from_millis(15)).await;
    }
}

#[tokio::test]
async fn thirty_rounds_back_to_back_each_sell_exactly_their_units() {
    const ROUNDS: i64 = 30;
    const UNITS: usize = 200;
    let app = App::start().await;
    let other = app.node().await;
    let other_url = other.door().borrow().clone();
    let schedule = back_to_back(ROUNDS, 1_000, 1_500);
    let sale = scheduled(&app, schedule, json!({ "allocation": UNITS })).await;
    let sale = id(&sale).to_owned();
    assert_eq!(app.view(&sale).await["round"], 1);

    // Six thousand units, and nobody goes away without one.
    let total = UNITS * usize::try_from(ROUNDS).unwrap();
    let mut crowd = JoinSet::new();
    let app = Arc::new(app);
    for client in 0..64 {
        let (app, sale) = (Arc::clone(&app), sale.clone());
        let url = if client % 2 == 0 {
            app.url.clone()
        } else {
            other_url.clone()
        };
        crowd.spawn(async move {
            let mut bought = Vec::new();
            for number in 0.. {
                let key = format!("{client}-{number}");
                match persist(&app, &url, &sale, &key).await {
                    Some(answer) => bought.push(answer.json()),
                    None => break,
                }
            }
            bought
        });
    }
    let bought: Vec<Value> = crowd.join_all().await.into_iter().flatten().collect();
    let mut by_round: HashMap<u64, usize> = HashMap::new();
    for order in &bought {
        *by_round
            .entry(order["round"].as_u64().unwrap())
            .or_default() += 1;
    }
    assert_eq!(bought.len(), total, "{by_round:?}");
    let each: Vec<_> = (1..=30)
        .map(|round| by_round.get(&round).copied())
        .collect();
    assert_eq!(each, vec![Some(UNITS); 30]);

    let all = rounds(&app, &sale).await;
    assert_eq!(states(&all), vec!["closed"; 30]);
    for (index, round) in all.iter().enumerate() {
        assert_eq!(round["round"], index + 1);
        assert_eq!(
            (&round["sold"], &round["remaining"]),
            (&json!(UNITS), &json!(0))
        );
        let path = format!("/v1/sales/{sale}/audit?round={}", index + 1);
        let pending = |answer: &Answer| answer.json()["verdict"] != "pending";
        let audit = app.until(&path, pending).await.json();
        assert_eq!(audit["verdict"], "pass", "{audit:#}");
    }
    assert_eq!(app.view(&sale).await["state"], "closed");
    other.stop().await;
    let app = Arc::into_inner(app).unwrap();
    app.finish().await;
}

/// Waits until an instant has passed.
async fn until(at: DateTime<Utc>) {
    if let Ok(wait) = (at - clock::now()).to_std() {
        sleep(wait).await;
    }
}

#[tokio::test]
async fn a_key_of_one_round_replays_in_the_next_and_limits_begin_anew() {
    let app = App::start().await;
    let schedule = back_to_back(2, 0, 1_200);
    let ends = schedule["windows"][0]["closes_at"].as_str().unwrap();
    let ends = DateTime::parse_from_rfc3339(ends).unwrap().to_utc();
    let sale = scheduled(&app, schedule, json!({ "allocation": 3 })).await;
    let sale = id(&sale).to_owned();
    let (ada, bob) = (clock::new_id(), clock::new_id());
    let first = app.buy(&sale, ada, "k", 1).await.expect(201);
    assert_eq!(first.json()["round"], 1);
    let limited = app.buy(&sale, ada, "more", 1).await.expect(409);
    assert_eq!(limited.json()["code"], "buyer_limit");
    until(ends + TimeDelta::milliseconds(50)).await;
    let again = app.buy(&sale, ada, "k", 1).await.expect(201);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.text, first.text);
    let other = app.buy(&sale, ada, "more", 1).await.expect(201);
    assert_eq!(
        (&other.json()["round"], &other.json()["seq"]),
        (&json!(2), &json!(1))
    );
    app.buy(&sale, bob, "k", 1).await.expect(201);
    let board = app.get(&format!("/v1/sales/{sale}/leaderboard")).await;
    assert_eq!(board.json()["data"].as_array().unwrap().len(), 2);
    let board = app
        .get(&format!("/v1/sales/{sale}/leaderboard?round=1"))
        .await;
    assert_eq!(board.json()["data"].as_array().unwrap().len(), 1);
    // The order of the first round can still be given back, to the first round.
    let path = format!("/v1/orders/{}/cancel", first.json()["id"].as_str().unwrap());
    send(app.operate(Method::POST, &path)).await.expect(200);
    let sold = until_rounds(&app, &sale, |rounds| states(rounds) == ["closed"; 2]).await;
    assert_eq!((&sold[0]["sold"], &sold[1]["sold"]), (&json!(0), &json!(2)));
    app.finish().await;
}

#[tokio::test]
async fn an_early_close_ends_one_round_and_the_next_comes_at_its_window() {
    let app = App::start().await;
    let (begin, next) = (after(0), after(3_600_000));
    let schedule = json!({ "windows": [
        { "opens_at": begin, "closes_at": after(60_000) },
        { "opens_at": next, "closes_at": after(3_660_000) },
    ]});
    let sale = scheduled(&app, schedule.clone(), json!({})).await;
    assert_eq!(sale["schedule"], schedule);
    assert_eq!(
        (&sale["round"], &sale["opens_at"]),
        (&json!(1), &json!(begin))
    );
    let sale = id(&sale).to_owned();
    until_rounds(&app, &sale, |rounds| {
        states(rounds) == ["open", "scheduled"]
    })
    .await;
    let ada = clock::new_id();
    let bought = app.buy(&sale, ada, "k", 1).await.expect(201);
    let close = || app.operate(Method::POST, &format!("/v1/sales/{sale}/close"));
    for _ in 0..2 {
        // The node may not have heard of the next round yet.
        let closed = async {
            loop {
                let view = send(close()).await.expect(200).json();
                if view["state"] == "scheduled" {
                    return view;
                }
                assert_eq!(
                    (&view["state"], &view["round"]),
                    (&json!("closed"), &json!(1))
                );
            }
        };
        let view = tokio::time::timeout(PATIENCE, closed).await.unwrap();
        assert_eq!(
            (&view["round"], &view["opens_at"]),
            (&json!(2), &json!(next))
        );
        assert_eq!((&view["sold"], &view["remaining"]), (&json!(0), &json!(5)));
    }
    assert_eq!(app.view(&sale).await["state"], "scheduled");
    let refused = app
        .buy(&sale, clock::new_id(), "k", 1)
        .await
        .expect(409)
        .json();
    assert_eq!(
        (&refused["code"], &refused["opens_at"]),
        (&json!("not_open"), &json!(next))
    );
    let again = app.buy(&sale, ada, "k", 1).await.expect(201);
    assert_eq!(again.text, bought.text);
    assert_eq!(states(&rounds(&app, &sale).await), ["closed", "scheduled"]);
    // What is added now is for the next round.
    let restock = app
        .operate(Method::POST, &format!("/v1/sales/{sale}/restock"))
        .header("Idempotency-Key", "five")
        .json(&json!({ "units": 5 }));
    let view = send(restock).await.expect(200).json();
    assert_eq!(
        (&view["round"], &view["remaining"]),
        (&json!(2), &json!(10))
    );
    app.finish().await;
}

#[tokio::test]
async fn what_passed_while_nothing_ran_is_missed_and_what_is_open_still_runs() {
    let mut app = App::start().await;
    let mut schedule = back_to_back(14, 0, 250);
    let windows = schedule["windows"].as_array_mut().unwrap();
    let end = windows[13]["closes_at"].clone();
    windows.push(json!({ "opens_at": end, "closes_at": after(600_000) }));
    windows.push(json!({ "opens_at": after(700_000), "closes_at": after(800_000) }));
    let end = DateTime::parse_from_rfc3339(end.as_str().unwrap()).unwrap();
    let sale = scheduled(&app, schedule.clone(), json!({})).await;
    let sale = id(&sale).to_owned();
    app.buy(&sale, clock::new_id(), "first", 1)
        .await
        .expect(201);
    app.stop().await;
    until(end.to_utc()).await;
    app.run().await;
    let done = |rounds: &[Value]| states(rounds)[14..] == ["open", "scheduled"];
    let all = until_rounds(&app, &sale, done).await;
    let at = |rounds: &[Value]| -> Vec<_> {
        let at = rounds
            .iter()
            .map(|round| (round["opens_at"].clone(), round["closes_at"].clone()));
        at.collect()
    };
    assert_eq!(at(&all), at(schedule["windows"].as_array().unwrap()));
    // The first ones had been seen open, the last missed ones never became rounds.
    assert_eq!(all[0]["state"], "closed");
    let begun = states(&all)
        .iter()
        .take_while(|state| **state == "closed")
        .count();
    assert!((1..9).contains(&begun), "{:?}", states(&all));
    assert_eq!(states(&all)[begun..14], vec!["missed"; 14 - begun]);
    assert_eq!(
        (&all[13]["round"], &all[13]["sold"]),
        (&Value::Null, &Value::Null)
    );
    // Rounds are numbered without gaps.
    let numbers: Vec<_> = all
        .iter()
        .filter_map(|round| round["round"].as_u64())
        .collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let order = app.buy(&sale, clock::new_id(), "late", 1).await.expect(201);
    assert_eq!(order.json()["round"], all[14]["round"]);
    app.finish().await;
}

#[tokio::test]
async fn two_applications_make_each_round_once() {
    let app = App::start().await;
    let others = [app.node().await, app.node().await];
    let schedule = json!({
        "cron": "* * * * * *", "time_zone": "Europe/Berlin", "duration_seconds": 1, "rounds": 6,
    });
    let sale = scheduled(&app, schedule, json!({ "allocation": 2 })).await;
    let sale = id(&sale).to_owned();
    let all = until_rounds(&app, &sale, |rounds| {
        rounds.len() == 6 && states(rounds).iter().all(|state| *state == "closed")
    })
    .await;
    for pair in all.windows(2) {
        assert_eq!(pair[0]["closes_at"], pair[1]["opens_at"]);
        assert_eq!(
            pair[0]["round"].as_u64().unwrap() + 1,
            pair[1]["round"].as_u64().unwrap()
        );
    }
    let provisioned: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM round_events JOIN sales ON number = sale
         WHERE kind = 'provision' AND sales.id = $1::uuid",
    )
    .bind(&sale)
    .fetch_one(&mut sql(&app).await)
    .await
    .unwrap();
    assert_eq!(provisioned, 6);
    assert_eq!(app.view(&sale).await["state"], "closed");
    let late = app.buy(&sale, clock::new_id(), "late", 1).await.expect(409);
    assert_eq!(late.json()["code"], "closed");
    for node in others {
        node.stop().await;
    }
    app.finish().await;
}

#[tokio::test]
async fn a_schedule_that_begins_in_the_past_is_refused_and_a_late_retry_is_not() {
    let app = App::start().await;
    let product = json!({
        "name": "Lamp", "description": "", "price": { "amount": 1999, "currency": "EUR" },
    });
    let product = app.operate(Method::POST, "/v1/products").json(&product);
    let product = send(product).await.expect(201).json();
    let post = async |schedule: &Value, key: &str| {
        let body = json!({
            "product_id": product["id"], "allocation": 5, "per_buyer_limit": 1,
            "schedule": schedule,
        });
        let request = app
            .operate(Method::POST, "/v1/sales")
            .header("Idempotency-Key", key);
        send(request.json(&body)).await
    };
    let until_passed = json!({
        "cron": "0 18 * * *", "time_zone": "UTC", "duration_seconds": 60, "until": "2020-01-01",
    });
    for (schedule, pointer) in [
        (until_passed, "#/schedule/until"),
        (
            back_to_back(1, -2_000, 1_000),
            "#/schedule/windows/0/closes_at",
        ),
        (
            back_to_back(3, -2_000, 1_000),
            "#/schedule/windows/0/closes_at",
        ),
    ] {
        let refused = post(&schedule, "past").await.expect(422).json();
        assert_eq!(refused["errors"][0]["pointer"], pointer, "{refused}");
    }
    let schedule = back_to_back(1, 0, 500);
    let made = post(&schedule, "key").await.expect(201).json();
    let sale = id(&made).to_owned();
    until_rounds(&app, &sale, |rounds| states(rounds) == ["closed"]).await;
    let again = post(&schedule, "key").await.expect(201);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.json()["id"], made["id"]);
    post(&back_to_back(1, 0, 500), "key").await.expect(422);
    app.finish().await;
}

/// Changes a sale as it is now.
async fn change(app: &App, sale: &str, change: Value) -> Answer {
    let path = format!("/v1/sales/{sale}");
    let now = app.get(&path).await.expect(200);
    let request = app
        .operate(Method::PATCH, &path)
        .header("If-Match", now.header("etag").unwrap())
        .json(&change);
    send(request).await
}

#[tokio::test]
async fn a_change_is_for_the_rounds_that_are_not_made_yet() {
    let app = App::start().await;
    let other = app.node().await;
    let daily = json!({
        "cron": "0 18 * * *", "time_zone": "Europe/Berlin", "duration_seconds": 600,
        "starts_on": "2030-01-01",
    });
    let sale = scheduled(
        &app,
        daily,
        json!({ "allocation": 3, "per_buyer_limit": 2 }),
    )
    .await;
    let sale = id(&sale).to_owned();
    let path = format!("/v1/sales/{sale}");
    let first = rounds(&app, &sale).await;
    assert_eq!(first.len(), 101, "what is made, and the next hundred");
    assert_eq!(
        (&first[1]["state"], &first[1]["allocation"]),
        (&json!("planned"), &json!(3))
    );
    // Another node has it in memory.
    let seen = |answer: &Answer| answer.json()["name"].clone();
    let elsewhere = async || {
        send(other.ask(app.request(Method::GET, &path)))
            .await
            .expect(200)
    };
    assert_eq!(seen(&elsewhere().await), "Lamp");

    let weekly = json!({ "cron": "0 9 * * MON", "time_zone": "UTC", "duration_seconds": 60 });
    let changed = change(
        &app,
        &sale,
        json!({
            "name": "Weekly lamp", "price": { "amount": 5, "currency": "EUR" }, "allocation": 7,
            "per_buyer_limit": 4, "per_order_limit": 1, "schedule": weekly,
        }),
    )
    .await
    .expect(200);
    // The round that is made keeps what it has.
    let view = changed.json();
    assert_eq!(
        (&view["name"], &view["schedule"]),
        (&json!("Weekly lamp"), &weekly)
    );
    assert_eq!(
        (&view["allocation"], &view["price"]["amount"]),
        (&json!(3), &json!(1999))
    );
    let after = rounds(&app, &sale).await;
    assert_eq!(after[0], first[0]);
    let next = &after[1];
    assert_eq!(
        (&next["opens_at"], &next["state"]),
        (&json!("2030-01-07T09:00:00.000Z"), &json!("planned"))
    );
    assert_eq!(
        (&next["allocation"], &next["price"]["amount"]),
        (&json!(7), &json!(5))
    );
    assert_eq!(
        (&next["per_buyer_limit"], &next["per_order_limit"]),
        (&json!(4), &json!(1))
    );
    let told = async {
        while seen(&elsewhere().await) != "Weekly lamp" {
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();

    let old = changed.header("etag").unwrap().to_owned();
    for (body, status, pointer) in [
        (json!({ "allocation": 0 }), 422, "#/allocation"),
        (json!({ "per_order_limit": 5 }), 422, "#/per_order_limit"),
        (json!({ "hold_seconds": 0 }), 422, "#/hold_seconds"),
        (json!({ "waitlist": true }), 422, "#/waitlist"),
        (json!({ "ends": "never" }), 422, "#/ends"),
        (
            json!({ "schedule": { "cron": "0 9 * * MON" } }),
            422,
            "#/schedule/time_zone",
        ),
        (
            json!({ "schedule": back_to_back(2, 1_000, 1_000) }),
            422,
            "#/schedule",
        ),
        (json!({ "schedule": 7 }), 400, "#/schedule"),
        (
            json!({ "opens_at": "2030-01-01T00:00:00Z" }),
            400,
            "#/opens_at",
        ),
    ] {
        let refused = change(&app, &sale, body.clone())
            .await
            .expect(status)
            .json();
        assert_eq!(refused["errors"][0]["pointer"], pointer, "{body}");
    }
    // No more rounds.
    let ended = change(&app, &sale, json!({ "schedule": null }))
        .await
        .expect(200);
    assert_eq!(ended.json()["schedule"], Value::Null);
    assert_eq!(rounds(&app, &sale).await, first[..1]);
    let none = change(&app, &sale, json!({ "allocation": 9 }))
        .await
        .expect(409);
    assert_eq!(none.json()["code"], "conflict");
    let stale = app.operate(Method::PATCH, &path).header("If-Match", old);
    send(stale.json(&json!({ "name": "x" }))).await.expect(412);
    other.stop().await;
    app.finish().await;
}

#[tokio::test]
async fn a_sale_that_opened_once_can_open_again() {
    let app = App::start().await;
    let other = app.node().await;
    let sale = app
        .sale(json!({ "allocation": 2, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale).to_owned();
    let ada = clock::new_id();
    app.buy(&sale, ada, "k", 2).await.expect(201);
    let elsewhere = async |key: &str| {
        let request = app.purchase(&sale, clock::new_id(), key, r#"{"quantity": 1}"#);
        send(other.ask(request)).await
    };
    assert_eq!(elsewhere("a").await.expect(409).json()["code"], "sold_out");
    // Its window lies ahead whenever it is sent.
    let again = || json!({ "schedule": back_to_back(1, 100, 60_000), "allocation": 4 });
    // It has no end, so nothing can come behind it.
    let refused = change(&app, &sale, again()).await.expect(409);
    assert_eq!(refused.json()["code"], "conflict");
    send(app.operate(Method::POST, &format!("/v1/sales/{sale}/close")))
        .await
        .expect(200);
    // As soon as PostgreSQL knows that it is closed.
    let changed = async {
        loop {
            let changed = change(&app, &sale, again()).await;
            if changed.status == 200 {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, changed).await.unwrap();
    let open = async {
        loop {
            let answer = elsewhere("b").await;
            if answer.status == 201 {
                return answer.json();
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let order = tokio::time::timeout(PATIENCE, open).await.unwrap();
    assert_eq!(order["round"], 2);
    // The first node hears of it, too.
    let path = format!("/v1/sales/{sale}");
    let view = app
        .until(&path, |answer| answer.json()["round"] == 2)
        .await
        .json();
    assert_eq!(view["allocation"], 4);
    let replayed = app.buy(&sale, ada, "k", 2).await.expect(201);
    assert_eq!(replayed.json()["round"], 1);
    other.stop().await;
    app.finish().await;
}

#[tokio::test]
async fn a_round_that_is_made_changes_until_it_opens() {
    let app = App::start().await;
    let window = |opens: i64, closes: i64| json!({ "opens_at": after(opens * 1_000), "closes_at": after(closes * 1_000) });
    let windows = [window(0, 600), window(3_600, 3_660), window(7_200, 7_260)];
    let schedule = json!({ "windows": windows });
    let sale = scheduled(&app, schedule, json!({ "allocation": 5 })).await;
    let sale = id(&sale).to_owned();
    until_rounds(&app, &sale, |rounds| {
        states(rounds) == ["open", "scheduled", "planned"]
    })
    .await;
    let path = |round: u32| format!("/v1/sales/{sale}/rounds/{round}");
    let change = async |round: u32, change: Value| {
        let now = app.get(&path(round)).await.expect(200);
        let request = app
            .operate(Method::PATCH, &path(round))
            .header("If-Match", now.header("etag").unwrap());
        send(request.json(&change)).await
    };
    let (opens, closes) = (after(1_800_000), after(5_000_000));
    let first = app.get(&path(2)).await.expect(200);
    let changed = change(
        2,
        json!({
            "opens_at": opens, "closes_at": closes, "price": { "amount": 7, "currency": "EUR" },
            "per_buyer_limit": 3, "per_order_limit": 2, "allocation": 9,
        }),
    )
    .await
    .expect(200)
    .json();
    let expected = json!({
        "round": 2, "state": "scheduled", "opens_at": opens, "closes_at": closes,
        "price": { "amount": 7, "currency": "EUR" }, "per_buyer_limit": 3, "per_order_limit": 2,
        "allocation": 9, "remaining": 9, "held": 0, "sold": 0, "seq": 2,
    });
    assert_eq!(changed, expected);
    assert_eq!(app.get(&path(2)).await.json(), expected);
    assert_eq!(rounds(&app, &sale).await[1], expected);
    let fewer = change(2, json!({ "allocation": 4 }))
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&fewer["allocation"], &fewer["seq"]),
        (&json!(4), &json!(3))
    );
    for (round, body, status, pointer) in [
        (2, json!({ "opens_at": after(599_000) }), 422, "#/opens_at"),
        (
            2,
            json!({ "closes_at": after(7_201_000) }),
            422,
            "#/closes_at",
        ),
        (2, json!({ "closes_at": opens }), 422, "#/closes_at"),
        (2, json!({ "per_order_limit": 4 }), 422, "#/per_order_limit"),
        (2, json!({ "allocation": 0 }), 422, "#/allocation"),
        (2, json!({ "name": "x" }), 400, "#/name"),
        (1, json!({ "per_buyer_limit": 3 }), 409, ""),
    ] {
        let refused = change(round, body.clone()).await.expect(status).json();
        let found = refused["errors"][0]["pointer"].as_str().unwrap_or_default();
        assert_eq!(found, pointer, "{body}: {refused}");
    }
    let stale = app.operate(Method::PATCH, &path(2));
    let stale = stale.header("If-Match", first.header("etag").unwrap());
    send(stale.json(&json!({ "allocation": 5 })))
        .await
        .expect(412);
    app.get(&path(3)).await.expect(404);
    // It is what comes next.
    send(app.operate(Method::POST, &format!("/v1/sales/{sale}/close")))
        .await
        .expect(200);
    let next = app.view(&sale).await;
    assert_eq!(
        (&next["round"], &next["opens_at"]),
        (&json!(2), &json!(opens))
    );
    assert_eq!(
        (&next["price"]["amount"], &next["remaining"]),
        (&json!(7), &json!(4))
    );
    let path = format!("/v1/sales/{sale}/audit?round=2");
    let decided = |answer: &Answer| answer.json()["verdict"] != "pending";
    let audit = app.until(&path, decided).await.json();
    assert_eq!(audit["verdict"], "pass", "{audit:#}");
    app.finish().await;
}

#[tokio::test]
async fn the_end_of_the_present_round_is_put_off() {
    let app = App::start().await;
    let other = app.node().await;
    let (end, later, next) = (after(2_500), after(6_000), after(600_000));
    let schedule = json!({ "windows": [
        { "opens_at": after(0), "closes_at": end },
        { "opens_at": next, "closes_at": after(700_000) },
    ]});
    let sale = scheduled(&app, schedule, json!({})).await;
    let sale = id(&sale).to_owned();
    until_rounds(&app, &sale, |rounds| {
        states(rounds) == ["open", "scheduled"]
    })
    .await;
    let extend = async |closes_at: &str| {
        let path = format!("/v1/sales/{sale}/extend");
        send(
            app.operate(Method::POST, &path)
                .json(&json!({ "closes_at": closes_at })),
        )
        .await
    };
    for bad in [after(1_000), after(600_100)] {
        let refused = extend(&bad).await.expect(422).json();
        assert_eq!(refused["errors"][0]["pointer"], "#/closes_at", "{refused}");
    }
    for _ in 0..2 {
        let extended = extend(&later).await.expect(200).json();
        assert_eq!(
            (&extended["closes_at"], &extended["seq"]),
            (&json!(later), &json!(1))
        );
    }
    let instant = |text: &str| DateTime::parse_from_rfc3339(text).unwrap().to_utc();
    until(instant(&end) + TimeDelta::milliseconds(20)).await;
    for (number, door) in [app.url.clone(), other.door().borrow().clone()]
        .iter()
        .enumerate()
    {
        let request = app.purchase(&sale, clock::new_id(), "late", r#"{"quantity": 1}"#);
        let order = send(redirected(request, door)).await.expect(201).json();
        assert_eq!(order["round"], 1, "node {number}");
    }
    until(instant(&later) + TimeDelta::milliseconds(20)).await;
    let view = app.view(&sale).await;
    assert_eq!(
        (&view["state"], &view["opens_at"]),
        (&json!("scheduled"), &json!(next))
    );
    extend(&later).await.expect(422);
    other.stop().await;
    app.finish().await;
}
