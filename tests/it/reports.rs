//! Leaderboards with names, exports, and reports on rounds.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::Executor;
use stockade::{auth::Role, clock};
use uuid::Uuid;

use super::{
    rounds_end::{AT_ONCE, archived, close},
    support::app::{Answer, App, PATIENCE, crowd, id, send, sql},
};

/// A request of a buyer.
fn as_buyer(app: &App, buyer: Uuid, method: Method, path: &str) -> reqwest::RequestBuilder {
    let token = app.token(buyer, Role::Buyer);
    app.request(method, path).bearer_auth(token)
}

async fn call_me(app: &App, buyer: Uuid, change: Value) -> Answer {
    send(as_buyer(app, buyer, Method::PATCH, "/v1/me").json(&change)).await
}

/// Waits until everything accepted is stored.
async fn stored(app: &App, sale: &str) {
    assert_eq!(app.audit(sale).await["verdict"], "pass");
}

fn members<T: for<'a> From<&'a Value>>(rows: &Value, member: &str) -> Vec<T> {
    let rows = rows.as_array().unwrap();
    rows.iter().map(|row| T::from(&row[member])).collect()
}

struct Text(Option<String>);

impl From<&Value> for Text {
    fn from(value: &Value) -> Self {
        Self(value.as_str().map(str::to_owned))
    }
}

#[tokio::test]
async fn a_leaderboard_has_names_of_those_who_want_it_and_shows_who_is_near() {
    let app = App::start_with(&AT_ONCE).await;
    let sale = app
        .sale(json!({ "allocation": 30, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale);
    let buyers: Vec<_> = (0..9).map(|_| clock::new_id()).collect();
    for (at, buyer) in buyers.iter().enumerate() {
        app.buy(sale, *buyer, &format!("k-{at}"), 1)
            .await
            .expect(201);
    }
    // The sixth buys once more, and counts by its first.
    app.buy(sale, buyers[5], "again", 1).await.expect(201);
    stored(&app, sale).await;

    let board = format!("/v1/sales/{sale}/leaderboard");
    let names = async || {
        let page = app.get(&board).await.expect(200).json();
        let names: Vec<Text> = members(&page["data"], "name");
        names.into_iter().map(|name| name.0).collect::<Vec<_>>()
    };
    assert_eq!(names().await, vec![None; 10]);
    // A name alone is not shown, and there is none to be shown yet.
    let (ada, bob) = (buyers[5], buyers[0]);
    call_me(&app, ada, json!({ "show_on_leaderboards": true }))
        .await
        .expect(422);
    let me = call_me(&app, ada, json!({ "display_name": " Ada " }))
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&me["display_name"], &me["show_on_leaderboards"]),
        (&json!("Ada"), &json!(false))
    );
    assert_eq!(names().await, vec![None; 10]);
    let me = call_me(&app, ada, json!({ "show_on_leaderboards": true }))
        .await
        .expect(200)
        .json();
    assert_eq!(
        me,
        send(as_buyer(&app, ada, Method::GET, "/v1/me"))
            .await
            .expect(200)
            .json()
    );
    let both = json!({ "display_name": "=Bob", "show_on_leaderboards": true });
    call_me(&app, bob, both).await.expect(200);
    let mut expected = vec![None; 10];
    expected[0] = Some("=Bob".to_owned());
    expected[5] = Some("Ada".to_owned());
    expected[9] = Some("Ada".to_owned());
    assert_eq!(names().await, expected);
    // Taken back, it is gone from the next answer on.
    for _ in 0..5 {
        call_me(&app, bob, json!({ "show_on_leaderboards": false }))
            .await
            .expect(200);
        expected[0] = None;
        assert_eq!(names().await, expected);
        call_me(&app, bob, json!({ "show_on_leaderboards": true }))
            .await
            .expect(200);
        expected[0] = Some("=Bob".to_owned());
        assert_eq!(names().await, expected);
    }
    for bad in [
        json!({ "display_name": "" }),
        json!({ "display_name": "x".repeat(41) }),
        json!({ "display_name": "a\u{202e}b" }),
        json!({ "display_name": "a\nb" }),
    ] {
        let answer = call_me(&app, bob, bad.clone()).await.expect(422);
        assert_eq!(
            answer.json()["errors"][0]["pointer"],
            "#/display_name",
            "{bad}"
        );
    }
    for bad in [
        json!({ "display_name": null }),
        json!({ "name": "x" }),
        json!({ "show_on_leaderboards": 1 }),
    ] {
        call_me(&app, bob, bad).await.expect(400);
    }

    let around = async |buyer, query: &str| {
        let path = format!("{board}/me?round=1{query}");
        send(as_buyer(&app, buyer, Method::GET, &path)).await
    };
    let whole = app.get(&board).await.json()["data"].clone();
    let check = async || {
        for (buyer, limit, first, rank) in [
            (ada, 5, 4, json!(6)),
            (ada, 1, 6, json!(6)),
            (ada, 100, 1, json!(6)),
            (bob, 5, 1, json!(1)),
            (buyers[8], 4, 8, json!(9)),
        ] {
            let seen = around(buyer, &format!("&limit={limit}"))
                .await
                .expect(200)
                .json();
            assert_eq!(seen["rank"], rank);
            let near = seen["data"].as_array().unwrap();
            let expected = whole.as_array().unwrap().iter().skip(first - 1).take(limit);
            assert_eq!(near.len(), expected.len(), "{limit} around {rank}");
            for (near, expected) in near.iter().zip(expected) {
                let mut near = near.clone();
                let you = near.as_object_mut().unwrap().remove("you").unwrap();
                assert_eq!(you, json!(near["buyer"] == seen["buyer"]));
                assert_eq!(&near, expected);
            }
        }
        let nobody = around(Uuid::from_u128(1), "").await.expect(200).json();
        assert_eq!(
            (&nobody["rank"], &nobody["data"]),
            (&Value::Null, &json!([]))
        );
    };
    check().await;
    for (query, status) in [("&limit=0", 400), ("&limit=101", 400)] {
        around(ada, query).await.expect(status);
    }
    let path = format!("{board}/me?round=2");
    send(as_buyer(&app, ada, Method::GET, &path))
        .await
        .expect(404);
    app.get(&format!("{board}/me")).await.expect(401);

    // The same of a round that has left Redis.
    close(&app, sale).await;
    archived(&mut sql(&app).await, sale).await;
    assert_eq!(app.get(&board).await.json()["data"], whole);
    check().await;
    app.finish().await;
}

#[tokio::test]
async fn an_export_has_every_order_once_and_no_formula() {
    let app = App::start().await;
    let name = "=HYPERLINK(\"http://evil\"), it says";
    let terms = json!({ "name": name, "allocation": 3_000, "per_buyer_limit": 3_000 });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let mut orders = Vec::new();
    // More than are read at a time, twice.
    for wave in 0..21 {
        let buys = (0..100).map(|at| {
            let body = json!({ "quantity": 1 + at % 2 }).to_string();
            app.purchase(
                sale,
                Uuid::from_u128(at + 1),
                &format!("k-{wave}-{at}"),
                body,
            )
        });
        // The later ones find nothing left.
        orders.extend(
            crowd(buys)
                .await
                .into_iter()
                .filter(|answer| answer.status == 201),
        );
    }
    let gone = id(&orders[7].json()).to_owned();
    send(app.operate(Method::POST, &format!("/v1/orders/{gone}/cancel")))
        .await
        .expect(200);
    stored(&app, sale).await;

    let path = format!("/v1/sales/{sale}/orders.csv");
    let export = send(app.operate(Method::GET, &path)).await.expect(200);
    assert_eq!(
        export.header("content-type"),
        Some("text/csv; charset=utf-8; header=present")
    );
    let file = format!("attachment; filename=\"orders-{sale}.csv\"");
    assert_eq!(export.header("content-disposition"), Some(&*file));
    assert_eq!(export.header("content-length"), None);
    let mut lines = export.text.split_terminator("\r\n");
    let columns = lines.next().unwrap();
    assert_eq!(
        columns,
        "order_id,sale_id,sale_name,round,seq,buyer_id,quantity,unit_price_minor,total_minor,\
         currency,status,accepted_as,accepted_at,durability,returned_units,refunded_units"
    );
    let quoted = format!("\"'{}\"", name.replace('"', "\"\""));
    let mut told: Vec<_> = orders
        .iter()
        .map(|answer| {
            let order = answer.json();
            let status = if id(&order) == gone {
                "cancelled"
            } else {
                "confirmed"
            };
            let text = |member: &str| order[member].as_str().unwrap().to_owned();
            let line = format!(
                "{},{sale},{quoted},1,{},{},{},1999,{},EUR,{status},confirmed,{},{},{},0",
                text("id"),
                order["seq"],
                text("buyer_id"),
                order["quantity"],
                order["total"]["amount"],
                text("accepted_at"),
                text("durability"),
                if status == "cancelled" {
                    order["quantity"].as_u64().unwrap()
                } else {
                    0
                },
            );
            (order["seq"].as_u64().unwrap(), line)
        })
        .collect();
    told.sort_unstable();
    assert!(told.len() > 2_000 - 100);
    let told: Vec<_> = told.iter().map(|(_, line)| line.as_str()).collect();
    assert_eq!(lines.collect::<Vec<_>>(), told);

    let round = send(app.operate(Method::GET, &format!("{path}?round=1")))
        .await
        .expect(200);
    assert_eq!(round.text, export.text);
    for (query, status) in [("?round=2", 404), ("?round=x", 400), ("?limit=1", 400)] {
        send(app.operate(Method::GET, &format!("{path}{query}")))
            .await
            .expect(status);
    }
    send(as_buyer(&app, Uuid::from_u128(1), Method::GET, &path))
        .await
        .expect(403);
    // Who leaves after the first bytes leaves nothing behind.
    let mut leaving = app.operate(Method::GET, &path).send().await.unwrap();
    leaving.chunk().await.unwrap().unwrap();
    drop(leaving);
    app.finish().await;
}

#[tokio::test]
async fn a_report_says_what_became_of_a_round_and_who_was_refused() {
    let app = App::start().await;
    let other = app.node().await;
    let sale = app
        .sale(json!({ "allocation": 5, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale);
    let path = format!("/v1/sales/{sale}/report");
    let report = async || {
        send(app.operate(Method::GET, &path))
            .await
            .expect(200)
            .json()
    };
    let empty = report().await;
    assert_eq!(
        (&empty["sold_out"], &empty["holds"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(empty["demand"]["requests"], 0);

    let buy = async |buyer: u128, key: &str, quantity: u64, status: u16| {
        app.buy(sale, Uuid::from_u128(buyer), key, quantity)
            .await
            .expect(status)
            .json()
    };
    let first = buy(1, "a", 2, 201).await;
    buy(2, "a", 2, 201).await;
    buy(2, "b", 1, 409).await;
    buy(3, "a", 3, 422).await;
    buy(3, "b", 2, 409).await;
    buy(4, "a", 1, 201).await;
    // Nothing is left, here and on another node, from memory and from Redis.
    let sold_out: Vec<_> = (10..40)
        .map(|buyer| {
            let body = json!({ "quantity": 2 }).to_string();
            let request = app.purchase(sale, Uuid::from_u128(buyer), "k", body);
            if buyer % 2 == 0 {
                other.ask(request)
            } else {
                request
            }
        })
        .collect();
    for answer in crowd(sold_out).await {
        assert_eq!(answer.json()["code"], "sold_out");
    }
    // A replay is no demand; another request under its key is refused.
    buy(1, "a", 2, 201).await;
    buy(1, "a", 1, 422).await;
    let restock = app.operate(Method::POST, &format!("/v1/sales/{sale}/restock"));
    let restock = restock
        .header("Idempotency-Key", "r")
        .json(&json!({ "units": 3 }));
    send(restock).await.expect(200);
    buy(5, "a", 2, 201).await;
    buy(6, "a", 1, 201).await;
    let cancel = format!("/v1/orders/{}/cancel", id(&first));
    send(app.operate(Method::POST, &cancel)).await.expect(200);
    stored(&app, sale).await;
    // The other node puts away what it has counted when it stops.
    other.stop().await;

    let seen = report().await;
    assert_eq!(
        seen["units"],
        json!({ "initial": 5, "allocation": 8, "remaining": 2, "held": 0, "sold": 6,
                "sell_through": 0.75 })
    );
    assert_eq!(
        seen["revenue"],
        json!({ "amount": 6 * 1999, "currency": "EUR" })
    );
    let orders = &seen["orders"];
    assert_eq!(
        orders["by_status"],
        json!({ "cancelled": 1, "confirmed": 4 })
    );
    for (member, value) in [
        ("accepted", 5),
        ("units", 8),
        ("buyers", 5),
        ("largest_units", 2),
    ] {
        assert_eq!(orders[member], value, "{member}");
    }
    let sum = |points: &Value, member: &str| -> i64 {
        let points = points.as_array().unwrap().iter();
        points.map(|point| point[member].as_i64().unwrap()).sum()
    };
    let sold = &seen["accepted_over_time"]["points"];
    assert_eq!((sum(sold, "orders"), sum(sold, "units")), (5, 8));
    let out = &seen["sold_out"];
    assert_eq!(out["times"], 2);
    assert!(out["after_ms"].as_i64().unwrap() >= 0, "{out}");

    let demand = &seen["demand"];
    let reasons = json!({
        "buyer_limit": { "requests": 1, "units": 1 },
        "idempotency_key_mismatch": { "requests": 1, "units": 1 },
        "insufficient": { "requests": 1, "units": 2 },
        "order_limit": { "requests": 1, "units": 3 },
        "sold_out": { "requests": 30, "units": 60 },
    });
    assert_eq!(demand["refused_by_reason"], reasons);
    for (member, value) in [
        ("requests", 39),
        ("accepted", 5),
        ("refused", 34),
        ("unmet_units", 62),
    ] {
        assert_eq!(demand[member], value, "{member}");
    }
    let points = demand["refused_over_time"]["points"].as_array().unwrap();
    let in_points: i64 = points
        .iter()
        .flat_map(|point| point["by_reason"].as_object().unwrap().values())
        .map(|asked| asked["requests"].as_i64().unwrap())
        .sum();
    assert_eq!(in_points, 34);
    let supply = &seen["supply_changes"];
    assert_eq!(supply.as_array().unwrap().len(), 1);
    for (member, value) in [
        ("kind", json!("restock")),
        ("units", json!(3)),
        ("sold_until_next", json!(3)),
    ] {
        assert_eq!(supply[0][member], value, "{member}");
    }
    assert!(supply[0]["sold_out_after_ms"].is_i64());

    // Putting away what is there already, as often as one likes, counts nothing twice.
    let shop = app.shop();
    futures::future::join_all((0..5).map(|_| shop.demand.put_away())).await;
    assert_eq!(report().await["demand"], *demand);
    // While it cannot be put away it is kept.
    let mut hand = sql(&app).await;
    hand.execute("ALTER TABLE refusals RENAME TO elsewhere")
        .await
        .unwrap();
    buy(1, "c", 3, 422).await;
    shop.demand.put_away().await;
    send(app.operate(Method::GET, &path)).await.expect(500);
    hand.execute("ALTER TABLE elsewhere RENAME TO refusals")
        .await
        .unwrap();
    let again = report().await["demand"].clone();
    assert_eq!(
        again["refused_by_reason"]["order_limit"],
        json!({ "requests": 2, "units": 6 })
    );

    for (query, status) in [("?round=2", 404), ("?round=0", 404), ("?round=x", 400)] {
        send(app.operate(Method::GET, &format!("{path}{query}")))
            .await
            .expect(status);
    }
    send(as_buyer(&app, Uuid::from_u128(1), Method::GET, &path))
        .await
        .expect(403);
    let nowhere = format!("/v1/sales/{}/report", Uuid::nil());
    let asked = tokio::time::timeout(PATIENCE, send(app.operate(Method::GET, &nowhere)));
    asked.await.unwrap().expect(404);
    app.finish().await;
}

#[tokio::test]
async fn a_report_says_what_became_of_holds() {
    let app = App::start().await;
    let terms = json!({ "allocation": 10, "payment": "sandbox", "hold_seconds": 600 });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let holds = async || {
        let path = format!("/v1/sales/{sale}/report");
        stored(&app, sale).await;
        let report = send(app.operate(Method::GET, &path)).await;
        report.expect(200).json()["holds"].clone()
    };
    let mut orders = Vec::new();
    for _ in 0..7 {
        let buyer = clock::new_id();
        let order = app.buy(sale, buyer, "k", 1).await.expect(201).json();
        orders.push((buyer, id(&order).to_owned()));
    }
    let mut expected = json!({
        "held": 7, "open": 7, "paid": 0, "confirmed": 0, "expired": 0, "cancelled": 0, "refunded": 0,
        "withdrawn": 0, "conversion": null,
    });
    assert_eq!(holds().await, expected);
    for (buyer, order) in &orders[..4] {
        let pay = as_buyer(
            &app,
            *buyer,
            Method::POST,
            &format!("/v1/orders/{order}/pay"),
        );
        let pay = pay
            .header("Idempotency-Key", "pay")
            .json(&json!({ "payment_method": "sandbox_ok" }));
        send(pay).await.expect(200);
    }
    // One that was paid and one that was not.
    for (_, order) in &orders[3..5] {
        let cancel = format!("/v1/orders/{order}/cancel");
        send(app.operate(Method::POST, &cancel)).await.expect(200);
    }
    expected["open"] = 2.into();
    expected["paid"] = 4.into();
    expected["confirmed"] = 3.into();
    expected["cancelled"] = 2.into();
    expected["conversion"] = 0.8.into();
    assert_eq!(holds().await, expected);
    app.finish().await;
}
