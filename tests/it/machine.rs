//! The machine under Redis: its clock, its disk, its memory, and who else uses it.

use std::{fs, path::PathBuf, time::Duration};

use chrono::TimeDelta;
use reqwest::Method;
use serde_json::json;
use stockade::clock;
use tokio::time::timeout;

use super::{
    durability::assert_lacks,
    faults::{Crowd, assert_not_applied, assert_sold, drop_of, lock_orders, until_fenced},
    power,
    selling::{acceptances, refused, strangers},
    support::{
        Redis,
        app::{Answer, App, PATIENCE, crowd, id, insist, send},
        shim::Shim,
        wire::Wire,
    },
};

async fn app_on(shim: &Shim) -> App {
    let redis = Redis::start_with(|options| options.environment = shim.environment()).await;
    App::start_on(redis, &[]).await
}

/// `/readyz` says this of Redis.
async fn until_redis(app: &App, says: &str) {
    let wanted = |answer: &Answer| {
        answer.status == 503
            && answer.json()["checks"]
                .as_array()
                .unwrap()
                .iter()
                .any(|check| {
                    let detail = check["detail"].as_str().unwrap_or_default();
                    check["name"] == "redis" && detail.contains(says)
                })
    };
    app.until("/readyz", wanted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hardly_syncs_delays_and_doubles_nothing() {
    let shim = Shim::new();
    let app = app_on(&shim).await;
    let sale = drop_of(&app, 30).await;
    let requests = strangers(&app, &sale, 60);
    let again: Vec<_> = requests
        .iter()
        .map(|request| request.try_clone().unwrap())
        .collect();
    shim.slow_syncs(2_000);
    let buying = tokio::spawn(crowd(requests));
    // What Redis need not decide is answered meanwhile.
    app.get("/v1/products").await.expect(200);
    app.buy(&sale, clock::new_id(), "k", 0).await.expect(422);
    for answer in buying.await.unwrap() {
        match answer.status.as_u16() {
            201 => {}
            409 => drop(refused(&answer, 409, "sold_out")),
            _ => drop(refused(&answer, 503, "unavailable")),
        }
    }
    shim.slow_syncs(0);
    let doors = [app.door()];
    let answers =
        futures::future::join_all(again.into_iter().map(|request| insist(request, &doors)));
    assert_sold(&app, &sale, &answers.await, 30).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_ends_redis_and_loses_nothing() {
    let shim = Shim::new();
    let mut app = app_on(&shim).await;
    let sale = drop_of(&app, 100).await;
    let mut crowd = Crowd::send(strangers(&app, &sale, 200), vec![app.door()]);
    crowd.served(30).await;
    // Whatever comes next does not fit.
    shim.fill_disk(1);
    let gone = async {
        while fs::read_to_string(format!("/proc/{}/cmdline", app.redis.server.pid()))
            .is_ok_and(|line| !line.is_empty())
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
    assert!(*crowd.served.borrow() < 200, "too late to be in the middle");
    until_redis(&app, "does not answer").await;
    shim.fill_disk(0);
    app.redis.server.restart().await.unwrap();
    let answers = crowd.done().await;
    assert_sold(&app, &sale, &answers, 100).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_postgresql_delays_storing_and_loses_nothing() {
    let shim = Shim::new();
    let (postgres, _dir) = power::postgres_that_syncs(&shim, "on").await;
    let app = power::app_on(Redis::start().await, &postgres).await;
    let sale = drop_of(&app, 300).await;
    let mut crowd = Crowd::send(strangers(&app, &sale, 200), vec![app.door()]);
    crowd.served(30).await;
    // No table grows any more, and no log.
    shim.fill_disk(1);
    let mut answers = crowd.done().await;
    let strangers_buy = async |count| {
        let crowd = Crowd::send(strangers(&app, &sale, count), vec![app.door()]);
        crowd.done().await
    };
    let halted = |answer: &Answer| {
        answer
            .text
            .contains("stockade_writer_halted{partition=\"0\"} 1")
    };
    while !halted(&app.get("/metrics").await) {
        answers.extend(strangers_buy(10).await);
    }
    answers.extend(strangers_buy(10).await);
    assert!(acceptances(&answers).len() > 200);
    shim.fill_disk(0);
    answers.extend(strangers_buy(300).await);
    assert_sold(&app, &sale, &answers, 300).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_fills_memory_while_postgresql_is_away_refuses_and_drains() {
    let app = App::start().await;
    let sale = drop_of(&app, 1_000_000).await;
    let mut sql = lock_orders(&app, "ACCESS EXCLUSIVE").await;
    let mut wire = Wire::connect(&app.redis).await;
    let used = async |wire: &mut Wire| {
        let memory = wire.ask(&["INFO", "memory"]).await.remove(0);
        let line = memory
            .lines()
            .find_map(|line| line.strip_prefix("used_memory:"));
        line.unwrap().parse::<u64>().unwrap()
    };
    let most = used(&mut wire).await + 512 * 1024;
    wire.run(&["CONFIG", "SET", "maxmemory", &most.to_string()])
        .await;
    let mut answers = Vec::new();
    let full = async {
        loop {
            let now = crowd(strangers(&app, &sale, 50)).await;
            let (accepted, refused): (Vec<_>, Vec<_>) =
                now.into_iter().partition(|answer| answer.status == 201);
            answers.extend(accepted);
            if !refused.is_empty() {
                return refused;
            }
        }
    };
    for answer in timeout(PATIENCE, full).await.unwrap() {
        assert_not_applied(&answer);
    }
    assert!(answers.len() > 100);
    // What one call may add, and no more.
    assert!(used(&mut wire).await < most + 512 * 1024);
    sqlx::raw_sql("COMMIT").execute(&mut sql).await.unwrap();
    let accepted = answers.len();
    assert_sold(&app, &sale, &answers, accepted).await;
    wire.run(&["CONFIG", "SET", "maxmemory", "0"]).await;
    answers.extend(crowd(strangers(&app, &sale, 20)).await);
    assert_sold(&app, &sale, &answers, accepted + 20).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_set_back_ends_no_sale_and_begins_none() {
    let shim = Shim::new();
    let app = app_on(&shim).await;
    let opens = |seconds| (clock::now() + TimeDelta::seconds(seconds)).to_rfc3339();
    let early = app
        .sale(json!({ "allocation": 50, "opens_at": opens(-2) }))
        .await;
    let late = app
        .sale(json!({ "allocation": 50, "opens_at": opens(60) }))
        .await;
    app.buy(id(&early), clock::new_id(), "k", 1)
        .await
        .expect(201);
    shim.set_clock_ahead(-10_000);
    for answer in crowd(strangers(&app, id(&early), 20)).await {
        answer.expect(201);
    }
    for answer in crowd(strangers(&app, id(&late), 20)).await {
        refused(&answer, 409, "not_open");
    }
    shim.set_clock_ahead(0);
    app.buy(id(&early), clock::new_id(), "k", 1)
        .await
        .expect(201);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_an_hour_ahead_closes_no_round() {
    let shim = Shim::new();
    let app = app_on(&shim).await;
    let closes = (clock::now() + TimeDelta::minutes(30)).to_rfc3339();
    let sale = app
        .sale(json!({ "allocation": 50, "closes_at": closes }))
        .await;
    let sale = id(&sale);
    app.buy(sale, clock::new_id(), "k", 1).await.expect(201);
    shim.set_clock_ahead(3_600_000);
    for answer in crowd(strangers(&app, sale, 20)).await {
        assert_not_applied(&answer);
    }
    until_fenced(&app).await;
    for answer in crowd(strangers(&app, sale, 20)).await {
        assert_not_applied(&answer);
    }
    shim.set_clock_ahead(0);
    app.ready().await;
    for answer in crowd(strangers(&app, sale, 20)).await {
        answer.expect(201);
    }
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_comes_back_with_another_clock_sells_nothing_until_it_is_right() {
    for ahead_ms in [3_600_000, -3_600_000] {
        let shim = Shim::new();
        let mut app = app_on(&shim).await;
        let closes = (clock::now() + TimeDelta::minutes(30)).to_rfc3339();
        let sale = app
            .sale(json!({ "allocation": 50, "per_buyer_limit": 1, "closes_at": closes }))
            .await;
        let sale = id(&sale);
        let mut answers = crowd(strangers(&app, sale, 20)).await;
        app.redis.server.kill().await;
        shim.set_clock_ahead(ahead_ms);
        app.redis.server.restart().await.unwrap();
        until_fenced(&app).await;
        for answer in crowd(strangers(&app, sale, 20)).await {
            assert_not_applied(&answer);
        }
        app.redis.server.kill().await;
        shim.set_clock_ahead(0);
        app.redis.server.restart().await.unwrap();
        app.ready().await;
        answers.extend(crowd(strangers(&app, sale, 40)).await);
        assert_sold(&app, sale, &answers, 50).await;
        app.finish().await;
    }
}

/// The file that Redis appends to.
fn journal_file(app: &App) -> PathBuf {
    let files = fs::read_dir(app.redis.dir().join("appendonlydir")).unwrap();
    let mut paths = files.map(|entry| entry.unwrap().path());
    paths
        .find(|path| path.to_str().unwrap().ends_with(".incr.aof"))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_end_of_the_file_sells_nothing() {
    for torn in [1, 100, 4_096] {
        let mut app = App::start().await;
        let sale = drop_of(&app, 50).await;
        // What PostgreSQL has is no loss, and would be made anew: nothing of this is stored.
        let _lock = lock_orders(&app, "SHARE").await;
        for answer in crowd(strangers(&app, &sale, 30)).await {
            answer.expect(201);
        }
        app.redis.server.kill().await;
        let file = fs::File::options()
            .write(true)
            .open(journal_file(&app))
            .unwrap();
        file.set_len(file.metadata().unwrap().len() - torn).unwrap();
        app.redis.server.restart().await.unwrap();
        until_fenced(&app).await;
        for answer in crowd(strangers(&app, &sale, 20)).await {
            assert_not_applied(&answer);
        }
        app.abandon().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_with_flipped_bits_is_refused_and_sells_on_once_it_is_mended() {
    let mut app = App::start().await;
    let sale = drop_of(&app, 50).await;
    let mut answers = crowd(strangers(&app, &sale, 30)).await;
    app.redis.server.kill().await;
    let path = journal_file(&app);
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    // Where a command begins: the file has no checksum, and bits inside an argument pass unseen.
    let half = whole.len() / 2;
    let begins = whole[half..].windows(3).position(|bytes| bytes == b"\r\n*");
    flipped[half + begins.unwrap() + 2] ^= 0xff;
    fs::write(&path, flipped).unwrap();
    let waits = timeout(Duration::from_secs(2), app.redis.server.restart());
    if let Ok(started) = waits.await {
        assert!(started.is_err(), "Redis took a file with flipped bits");
    }
    until_redis(&app, "does not answer").await;
    for answer in crowd(strangers(&app, &sale, 20)).await {
        refused(&answer, 503, "unavailable");
    }
    fs::write(&path, whole).unwrap();
    app.redis.server.restart().await.unwrap();
    answers.extend(
        Crowd::send(strangers(&app, &sale, 40), vec![app.door()])
            .done()
            .await,
    );
    assert_sold(&app, &sale, &answers, 50).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_memory_refuses_purchases_and_takes_orders_back() {
    let app = App::start().await;
    let sale = drop_of(&app, 40).await;
    let mut bought = crowd(strangers(&app, &sale, 10)).await;
    let mut wire = Wire::connect(&app.redis).await;
    wire.run(&["CONFIG", "SET", "maxmemory", "1"]).await;
    for answer in crowd(strangers(&app, &sale, 50)).await {
        assert_not_applied(&answer);
    }
    assert_eq!(app.view(&sale).await["sold"], 10);
    let first = acceptances(&bought).remove(0);
    let cancel = format!("/v1/orders/{}/cancel", id(&first));
    send(app.operate(Method::POST, &cancel)).await.expect(200);
    wire.run(&["CONFIG", "SET", "maxmemory", "0"]).await;
    bought.extend(crowd(strangers(&app, &sale, 50)).await);
    assert_eq!(
        acceptances(&bought).len(),
        41,
        "ten, and all that were left or came back"
    );
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_evicts_is_never_ready_and_sells_nothing_of_what_it_lost() {
    let redis = Redis::start_with(|options| {
        let policy = ("maxmemory-policy".to_owned(), "allkeys-random".to_owned());
        options.settings.push(policy);
    });
    let mut app = App::on(redis.await, &[]).await;
    let mut wire = Wire::connect(&app.redis).await;
    let node = app.node().await;
    let ready = node.ask(app.client.get("http://127.0.0.1:1/readyz"));
    let answer = send(ready).await.expect(503);
    assert!(!answer.text.is_empty());
    node.stop().await;

    wire.run(&["CONFIG", "SET", "maxmemory-policy", "noeviction"])
        .await;
    app.run().await;
    let sale = drop_of(&app, 40).await;
    for answer in crowd(strangers(&app, &sale, 10)).await {
        answer.expect(201);
    }
    wire.run(&["CONFIG", "SET", "maxmemory-policy", "allkeys-random"])
        .await;
    until_redis(&app, "maxmemory-policy is allkeys-random").await;
    wire.run(&["CONFIG", "SET", "maxmemory", "1"]).await;
    wire.run(&["CONFIG", "SET", "maxmemory", "0"]).await;
    for answer in crowd(strangers(&app, &sale, 30)).await {
        assert_lacks(&answer, "maxmemory-policy is allkeys-random");
    }
    app.abandon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_key_of_a_live_sale_ever_expires() {
    let app = App::start().await;
    let sale = drop_of(&app, 40).await;
    let restock = app
        .operate(Method::POST, &format!("/v1/sales/{sale}/restock"))
        .header("Idempotency-Key", "k")
        .json(&json!({ "units": 1 }));
    send(restock).await.expect(200);
    crowd(strangers(&app, &sale, 10)).await;
    let mut wire = Wire::connect(&app.redis).await;
    let keys = wire.ask(&["KEYS", "*"]).await;
    assert!(keys.len() >= 8, "{keys:?}");
    for key in keys {
        assert_eq!(wire.run(&["TTL", &key]).await, "-1", "{key}");
    }
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_script_of_somebody_else_makes_buyers_wait_and_nothing_more() {
    let redis = Redis::start_with(|options| {
        let threshold = ("busy-reply-threshold".to_owned(), "100".to_owned());
        options.settings.push(threshold);
    });
    let app = App::start_on(redis.await, &[]).await;
    let sale = drop_of(&app, 30).await;
    let mut wire = Wire::connect(&app.redis).await;
    let busy =
        "local s = redis.call('TIME')[1] while redis.call('TIME')[1] - s < 3 do end return 'done'";
    wire.send(&["EVAL", busy, "0"]).await;
    let requests = strangers(&app, &sale, 60);
    let again: Vec<_> = requests
        .iter()
        .map(|request| request.try_clone().unwrap())
        .collect();
    for answer in crowd(requests).await {
        if answer.status != 201 {
            let _either = answer.status == 409 || refused(&answer, 503, "unavailable").is_object();
        }
    }
    assert_eq!(wire.line().await, "$4");
    let doors = [app.door()];
    let answers =
        futures::future::join_all(again.into_iter().map(|request| insist(request, &doors)));
    assert_sold(&app, &sale, &answers.await, 30).await;
    app.finish().await;
}
