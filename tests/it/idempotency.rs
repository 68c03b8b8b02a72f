//! One key, one effect, one answer: where the tests of selling do not reach.

use std::{fmt::Write, time::Duration};

use futures::future::join_all;
use reqwest::RequestBuilder;
use serde_json::json;
use stockade::{
    clock,
    domain::{
        id::{BuyerId, Fingerprint, OrderId, Partition, RoundId, SaleNumber},
        money::{Currency, Money},
        order::{Decision, Durability, Order, Purchase, Refusal},
        round::{Intent, Policy, Terms, Window},
    },
    engine::Engine,
    sales::StoredReplay,
};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    selling::{OrderRow, assert_replays, cancel, refused, restock, steer, stored, strangers, uuid},
    support::{
        Postgres, Redis,
        app::{Answer, App, PATIENCE, crowd, id, insist, redirected, send, sql},
        engine,
        process::Served,
    },
};

/// The purchase that the application makes of a request for `quantity` units.
fn purchase(round: RoundId, buyer: Uuid, key: &str, quantity: u64) -> Purchase {
    let buyer = BuyerId(buyer);
    Purchase {
        round,
        order: OrderId::derive(round.sale, buyer, key),
        buyer,
        quantity,
        fingerprint: Fingerprint::of(&[b"order", &quantity.to_be_bytes()]),
        durability: Durability::Fsync,
        redeem: false,
        archive: 0,
    }
}

/// Buys a unit of the first round of a sale, past the application.
pub(crate) async fn accept(
    app: &App,
    engine: &Engine,
    sale: &str,
    buyer: Uuid,
    key: &str,
) -> Order {
    let sale = app
        .shop()
        .directory
        .by_id(stockade::domain::id::SaleId(sale.parse().unwrap()));
    let round = sale.await.unwrap().unwrap().round_id();
    let answer = engine
        .purchase(purchase(round, buyer, key, 1))
        .await
        .unwrap();
    match answer.decision {
        Decision::Accepted(order) => order,
        other => panic!("{other:?}"),
    }
}

fn terms(limit: u64, allocation: u64) -> Terms {
    Terms {
        window: Window {
            opens_at_ms: 0,
            closes_at_ms: None,
        },
        per_buyer_limit: limit,
        per_order_limit: limit,
        unit_price: Money::new(1999, Currency::parse("EUR").unwrap()).unwrap(),
        allocation,
        policy: Policy::default(),
    }
}

#[tokio::test]
async fn a_key_of_the_last_round_replays_its_order_in_the_next() {
    let redis = Redis::start().await;
    let engine = engine(&redis, Partition(0)).await;
    let sale = SaleNumber(1);
    let [first, second] = [1, 2].map(|round| RoundId { sale, round });
    let terms = terms(1, 2);
    let [ada, bob, eve] = [1, 2, 3].map(Uuid::from_u128);
    let decide = async |round, buyer, key| {
        let answer = engine.purchase(purchase(round, buyer, key, 1)).await;
        answer.unwrap().decision
    };
    engine.provision(first, &terms).await.unwrap();
    let Decision::Accepted(order) = decide(first, ada, "k").await else {
        panic!("not accepted");
    };
    engine.control(first, Intent::Closed, eve).await.unwrap();
    assert_eq!(
        decide(first, bob, "k").await,
        Decision::Refused(Refusal::Closed)
    );
    engine.provision(second, &terms).await.unwrap();

    // The sale has turned; whoever retries asks for its present round.
    assert_eq!(decide(second, ada, "k").await, Decision::Replayed(order));
    assert_eq!(order.round, first);
    // Refused in the last round is not used: the same key buys in this one.
    let Decision::Accepted(other) = decide(second, bob, "k").await else {
        panic!("not accepted");
    };
    assert_eq!((other.round, other.seq), (second, 1));
    // The limit is the round's: with a new key the first buyer buys again, and sells it out.
    assert!(matches!(
        decide(second, ada, "new").await,
        Decision::Accepted(_)
    ));
    for round in [first, second] {
        assert_eq!(decide(round, ada, "k").await, Decision::Replayed(order));
        assert_eq!(decide(round, bob, "k").await, Decision::Replayed(other));
    }
    let cancelled = super::support::cancel(&engine, first, order.id, eve);
    cancelled.await.unwrap();
    let Decision::Replayed(again) = decide(second, ada, "k").await else {
        panic!("not replayed");
    };
    assert_eq!(again.accepted_as, order.accepted_as);
    let dump = engine.dump(&[first, second]).await.unwrap();
    assert_eq!(dump.sales[&sale].orders.len(), 3);
}

#[tokio::test]
async fn refused_keys_leave_nothing_behind() {
    let redis = Redis::start().await;
    let engine = engine(&redis, Partition(0)).await;
    let round = RoundId {
        sale: SaleNumber(1),
        round: 1,
    };
    engine.provision(round, &terms(1, 2)).await.unwrap();
    let ada = Uuid::from_u128(1);
    engine.purchase(purchase(round, ada, "k", 1)).await.unwrap();
    let before = engine.dump(&[round]).await.unwrap();
    // Whoever asks for too much is refused by the script: memory has no say while a unit is left.
    for batch in 0..20_u32 {
        let purchases = (0..1_000_u32).map(|at| {
            let buyer = Uuid::from_u128(u128::from(batch * 1_000 + at) + 2);
            engine.purchase(purchase(round, buyer, "k", 2))
        });
        for answer in join_all(purchases).await {
            let answer = answer.unwrap();
            let refusal = Refusal::OrderLimit { limit: 1, held: 0 };
            assert_eq!(
                (answer.decision, answer.looked_up),
                (Decision::Refused(refusal), true)
            );
        }
    }
    assert_eq!(engine.dump(&[round]).await.unwrap(), before);
}

/// A client that hangs up as soon as it has sent its request.
async fn send_and_leave(request: RequestBuilder) {
    let (_, request) = request.build_split();
    let request = request.unwrap();
    let url = request.url();
    let address = (url.host_str().unwrap(), url.port().unwrap());
    let mut stream = TcpStream::connect(address).await.unwrap();
    let body = request.body().unwrap().as_bytes().unwrap();
    let mut text = format!("POST {} HTTP/1.1\r\nhost: x\r\n", url.path());
    for (name, value) in request.headers() {
        write!(text, "{name}: {}\r\n", value.to_str().unwrap()).unwrap();
    }
    write!(text, "content-length: {}\r\n\r\n", body.len()).unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    // The first byte of the answer says that there is one. Half of the clients do not wait for it.
    if request.headers()["idempotency-key"] == "k0" {
        stream.readable().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_lost_his_answer_gets_it_after_sell_out_and_close() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 200, "per_buyer_limit": 1 }))
        .await;
    let sale = id(&sale).to_owned();
    let body = r#"{"quantity":1}"#;
    let buyers: Vec<_> = (0..300)
        .map(|n| (clock::new_id(), format!("k{}", n % 2)))
        .collect();
    let purchase = |(buyer, key): &(Uuid, String)| app.purchase(&sale, *buyer, key, body);
    join_all(buyers.iter().map(|buyer| send_and_leave(purchase(buyer)))).await;
    // Strangers take what is left, until nothing is.
    while app.view(&sale).await["sold_out"] == false {
        crowd(strangers(&app, &sale, 32)).await;
    }
    let answered = stored(&app, &sale).await;
    let answers = crowd(buyers.iter().map(purchase)).await;
    let mut found = 0;
    for answer in &answers {
        if answer.status == 201 {
            assert_eq!(answer.header("idempotency-replayed"), Some("true"));
            let order = OrderRow::of(&answer.json());
            assert!(answered.contains(&order), "{order:?}");
            found += 1;
        } else {
            refused(answer, 409, "sold_out");
        }
    }
    let theirs = |row: &&OrderRow| buyers.iter().any(|(buyer, _)| *buyer == row.buyer);
    assert_eq!(found, answered.iter().filter(theirs).count());
    assert!(found >= 150, "{found} of 150 who waited for their answer");
    steer(&app, &sale, "close").await.expect(200);
    let replays: Vec<_> = answers
        .iter()
        .filter(|answer| answer.status == 201)
        .collect();
    let again = join_all(buyers.iter().map(|buyer| send(purchase(buyer)))).await;
    let again: Vec<_> = again.iter().filter(|answer| answer.status == 201).collect();
    assert_eq!(again.len(), replays.len());
    for first in replays {
        assert!(again.iter().any(|again| again.text == first.text));
    }
    assert_eq!(stored(&app, &sale).await, answered);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_one_key_however_it_is_written_and_its_buyers_alone() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 99, "per_buyer_limit": 9 }))
        .await;
    let sale = id(&sale).to_owned();
    let [ada, bob] = [clock::new_id(), clock::new_id()];
    let body = r#"{"quantity":2}"#;
    // Sixty-four devices that write it in three ways, and the body in four.
    let bodies = [
        body,
        r#"{ "quantity" : 2 }"#,
        "{\"quantity\":2}\n",
        "\t{\"quantity\":\t2}",
    ];
    let many = (0..64).map(|device| {
        let key = ["k-1", "\"k-1\"", " k-1\t"][device % 3];
        app.purchase(&sale, ada, key, bodies[device % 4])
    });
    let answers = crowd(many).await;
    let first = answers
        .iter()
        .filter(|answer| answer.header("idempotency-replayed").is_none());
    let first: Vec<_> = first.collect();
    assert_eq!(first.len(), 1);
    for answer in &answers {
        assert_eq!(
            (answer.status.as_u16(), &answer.text),
            (201, &first[0].text)
        );
    }
    let other = app.buy(&sale, bob, "\"k-1\"", 2).await.expect(201);
    assert_eq!(other.header("idempotency-replayed"), None);
    assert_ne!(id(&other.json()), id(&first[0].json()));
    // In capitals it is another key.
    let capitals = app.buy(&sale, ada, "K-1", 2).await.expect(201);
    assert_ne!(id(&capitals.json()), id(&first[0].json()));

    // Another body under a known key changes nothing, whatever has become of the sale.
    let before = app.view(&sale).await;
    let mismatch = async |quantity| {
        let problem = refused(
            &app.buy(&sale, ada, "k-1", quantity).await,
            422,
            "idempotency_key_mismatch",
        );
        assert_eq!(problem["retry"], "never");
    };
    for quantity in [1, 3, 1_000_000] {
        mismatch(quantity).await;
    }
    let after = app.view(&sale).await;
    for member in ["remaining", "sold", "seq", "state"] {
        assert_eq!(before[member], after[member], "{member}");
    }
    cancel(&app, ada, id(&first[0].json())).await.expect(200);
    steer(&app, &sale, "close").await.expect(200);
    mismatch(1).await;
    assert_replays(&app.buy(&sale, ada, "\"k-1\"", 2).await, first[0]);
    assert_eq!(stored(&app, &sale).await.len(), 3);
    app.finish().await;
}

#[tokio::test]
async fn what_only_postgresql_remembers_is_replayed_from_there() {
    let app = App::start().await;
    let sale = app.sale(json!({ "allocation": 9 })).await;
    let sale = id(&sale).to_owned();
    let [ada, bob] = [clock::new_id(), clock::new_id()];
    let body = app.buy(&sale, ada, "k", 2).await.expect(201).json();
    cancel(&app, ada, id(&body)).await.expect(200);
    let row = stored(&app, &sale).await.remove(0);
    assert_eq!(row.status, "cancelled");

    let shop = app.shop();
    let order = OrderId(uuid(&body["id"]));
    let fingerprint = |quantity: u64| Fingerprint::of(&[b"order", &quantity.to_be_bytes()]);
    let replay = async |buyer, quantity| {
        let replay = shop.replay_stored(order, BuyerId(buyer), fingerprint(quantity));
        replay.await.unwrap()
    };
    let StoredReplay::Replay(found) = replay(ada, 2).await else {
        panic!("not replayed");
    };
    // All that its 201 is made from is as Redis has it.
    let in_redis = shop.engines.all()[0].order(order).await.unwrap().unwrap();
    assert_eq!(found, in_redis);
    assert_eq!(
        shop.receipts
            .sign(stockade::domain::id::SaleId(uuid(&body["sale_id"])), &found),
        Ok(Some(body["receipt"].as_str().unwrap().to_owned()))
    );
    assert_eq!(replay(ada, 1).await, StoredReplay::Mismatch);
    assert_eq!(replay(bob, 2).await, StoredReplay::Mismatch);
    let unknown = OrderId::derive(order.sale(), BuyerId(ada), "new");
    let none = shop
        .replay_stored(unknown, BuyerId(ada), fingerprint(2))
        .await;
    assert_eq!(none.unwrap(), StoredReplay::None);
    app.finish().await;
}

/// Who bought, with which request, and the first answer.
struct Sold(Vec<(RequestBuilder, Answer)>);

impl Sold {
    /// Everybody gets the same bytes again, and keeps his key to what he asked for.
    async fn is_replayed(&self, app: &App, sale: &str) {
        let doors = [app.door()];
        for (request, first) in &self.0 {
            // The node may not have noticed yet that a store was away.
            assert_replays(&insist(request.try_clone().unwrap(), &doors).await, first);
        }
        let buyer = uuid(&self.0[0].1.json()["buyer_id"]);
        let changed = app.buy(sale, buyer, "k", 2).await;
        refused(&changed, 422, "idempotency_key_mismatch");
        // Sixty-four devices of one buyer at once.
        let (request, first) = &self.0[self.0.len() / 2];
        let devices = (0..64).map(|_| redirected(request.try_clone().unwrap(), &app.url));
        for again in crowd(devices).await {
            assert_replays(&again, first);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_201_is_replayed_byte_by_byte_after_each_crash() {
    let mut postgres = Postgres::start(&[]).await;
    let mut app = App::without_node(&[]).await;
    app.database_url = postgres.server.url().clone();
    let mut node = Served::start(&app).await;
    app.speak_to(node.url());
    let sale = app
        .sale(json!({ "allocation": 36, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale).to_owned();

    let mut sold = Sold(Vec::new());
    for crash in ["application", "redis", "postgresql"] {
        let buyers: Vec<_> = (0..12).map(|_| clock::new_id()).collect();
        let requests = buyers
            .iter()
            .map(|buyer| app.purchase(&sale, *buyer, "k", r#"{"quantity":1}"#));
        let mut insisting = JoinSet::new();
        for request in requests {
            let door = node.door();
            insisting.spawn(async move {
                let again = request.try_clone().unwrap();
                let answer = insist(request, &[door]).await;
                (again, answer.expect(201))
            });
        }
        // At least one has an answer when it happens, and all get one afterwards.
        sold.0.push(insisting.join_next().await.unwrap().unwrap());
        match crash {
            "application" => {
                node.kill().await;
                node.start_again().await;
            }
            "redis" => {
                app.redis.server.kill().await;
                app.redis.server.restart().await.unwrap();
            }
            _ => {
                postgres.server.kill().await;
                postgres.server.restart().await.unwrap();
            }
        }
        app.speak_to(node.url());
        sold.0
            .extend(timeout(PATIENCE, insisting.join_all()).await.unwrap());
        app.ready().await;
        sold.is_replayed(&app, &sale).await;
    }
    let late = app.buy(&sale, clock::new_id(), "k", 1).await;
    refused(&late, 409, "sold_out");
    sold.is_replayed(&app, &sale).await;
    steer(&app, &sale, "close").await.expect(200);
    sold.is_replayed(&app, &sale).await;
    let mut expected: Vec<_> = sold
        .0
        .iter()
        .map(|(_, answer)| OrderRow::of(&answer.json()))
        .collect();
    expected.sort();
    assert_eq!(stored(&app, &sale).await, expected);
    app.finish().await;
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_turn_of_a_round_replays_what_the_last_one_sold() {
    let mut app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 3, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale).to_owned();
    let [ada, bob] = [clock::new_id(), clock::new_id()];
    let first = app.buy(&sale, ada, "k", 2).await.expect(201);
    steer(&app, &sale, "close").await.expect(200);
    refused(&app.buy(&sale, bob, "k", 1).await, 409, "closed");
    assert_eq!(stored(&app, &sale).await, [OrderRow::of(&first.json())]);

    // The next round, with the same rules.
    let mut sql = sql(&app).await;
    let turn = "WITH turned AS (UPDATE sales SET round = 2 WHERE id = $1 RETURNING number)
        INSERT INTO rounds (sale, round, unit_price, currency, initial_allocation, per_buyer_limit,
                            per_order_limit, opens_at, allocation, remaining)
        SELECT sale, 2, unit_price, currency, initial_allocation, per_buyer_limit, per_order_limit,
               opens_at, initial_allocation, initial_allocation
        FROM rounds JOIN turned ON sale = number WHERE round = 1";
    sqlx::query(turn)
        .bind(sale.parse::<Uuid>().unwrap())
        .execute(&mut sql)
        .await
        .unwrap();
    app.stop().await;
    app.run().await;
    // It is sold as soon as Redis has it.
    let provisioned = async {
        loop {
            let answer = app.buy(&sale, bob, "k", 1).await;
            if answer.status == 201 {
                return answer;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    let other = timeout(PATIENCE, provisioned).await.unwrap();
    assert_eq!(other.json()["round"], 2);
    assert_eq!(other.header("idempotency-replayed"), None);
    assert_replays(&app.buy(&sale, ada, "k", 2).await, &first);
    refused(
        &app.buy(&sale, ada, "k", 1).await,
        422,
        "idempotency_key_mismatch",
    );
    // With a new key she buys in this round.
    let more = app.buy(&sale, ada, "new", 2).await.expect(201);
    assert_eq!(
        (&more.json()["round"], &more.json()["seq"]),
        (&json!(2), &json!(2))
    );
    assert_eq!(app.view(&sale).await["sold_out"], true);
    for (buyer, key, quantity, first) in [
        (ada, "k", 2, &first),
        (bob, "k", 1, &other),
        (ada, "new", 2, &more),
    ] {
        assert_replays(&app.buy(&sale, buyer, key, quantity).await, first);
    }
    assert_eq!(stored(&app, &sale).await.len(), 3);
    app.finish().await;
}

#[tokio::test]
async fn a_restock_has_one_effect_across_restarts() {
    let mut app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 2, "per_buyer_limit": 9 }))
        .await;
    let sale = id(&sale).to_owned();
    let first = send(restock(&app, &sale, 5, "r")).await.expect(200);
    assert_eq!(first.header("idempotency-replayed"), None);
    app.stop().await;
    app.redis.server.kill().await;
    app.redis.server.restart().await.unwrap();
    app.run().await;
    let again = send(restock(&app, &sale, 5, "\"r\"")).await.expect(200);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    // It shows the sale as it stands, so all but the clock is the same as long as nothing happens.
    let [mut first, mut again] = [first.json(), again.json()];
    for sale in [&mut first, &mut again] {
        assert!(
            sale.as_object_mut()
                .unwrap()
                .remove("server_time_ms")
                .is_some()
        );
    }
    assert_eq!(first, again);
    app.buy(&sale, clock::new_id(), "k", 1).await.expect(201);
    let again = send(restock(&app, &sale, 5, "r")).await.expect(200).json();
    assert_eq!(
        (&again["allocation"], &again["remaining"], &again["seq"]),
        (&json!(7), &json!(6), &json!(2))
    );
    refused(
        &send(restock(&app, &sale, 4, "r")).await,
        422,
        "idempotency_key_mismatch",
    );
    app.finish().await;
}
