//! A hostile network between client, node and stores: answers that get lost, requests that arrive
//! late, stores that stand still. One key has one effect, nobody is told no who has an order, and
//! nothing happens after its deadline. Each history is judged, each sale audited.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use futures::{StreamExt, future::BoxFuture};
use rand::{Rng, SeedableRng, rngs::StdRng};
use reqwest::{Method, Url};
use rustix::process::Signal;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use stockade::{auth::Role, clock};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::{
    embedded::redis,
    selling::{refused, stored},
    support::{
        app::{App, PATIENCE, id, redirected, send},
        history::{Kind, Outcome, Recorder, assert_kept},
        market::Market,
        proxy::{BadWeather, Proxy, Weather},
        seed, variable,
    },
};

/// Attempts that one client makes under bad weather.
const ATTEMPTS: usize = 10;

/// Refused requests with fresh keys when nobody asks for more.
const REFUSED: u64 = 20_000;

/// One sale, and all that is asked of it.
struct Shop {
    app: App,
    recorder: Recorder,
    sale: String,
    repeat: String,
}

impl Shop {
    async fn open(app: App, terms: Value) -> Self {
        let sale = id(&app.sale(terms).await).to_owned();
        Self {
            app,
            recorder: Recorder::default(),
            sale,
            repeat: "the same test".to_owned(),
        }
    }

    /// Asks once.
    async fn buy(&self, url: &str, buyer: Uuid, key: &str, quantity: u64) -> Outcome {
        let body = json!({ "quantity": quantity }).to_string();
        let request = self.app.purchase(&self.sale, buyer, key, body);
        let request = redirected(request, url).timeout(Duration::from_secs(8));
        let (sale, kind) = (self.sale.parse().unwrap(), Kind::Purchase { quantity });
        self.recorder.ask(sale, kind, buyer, key, request).await
    }

    /// Asks for one unit until there is a definite answer, so often at most.
    async fn insist(&self, url: &str, buyer: Uuid, attempts: usize) -> Option<Outcome> {
        for _ in 0..attempts {
            let outcome = self.buy(url, buyer, "k", 1).await;
            if is_definite(&outcome) {
                return Some(outcome);
            }
            sleep(Duration::from_millis(20)).await;
        }
        None
    }

    /// Everybody insists on one unit, under this key of theirs, until they have it.
    async fn all_get_theirs(&self, url: &str, buyers: &[Uuid]) -> Vec<(String, bool)> {
        let asking = at_most(32, buyers, |buyer| {
            Box::pin(async move { self.insist(url, *buyer, usize::MAX).await.unwrap() })
        });
        let answers = timeout(PATIENCE, asking).await.unwrap();
        answers.into_iter().map(accepted).collect()
    }

    /// Judges everything, and ends.
    async fn close(self) {
        let rows = stored(&self.app, &self.sale).await;
        assert!(!rows.is_empty());
        assert_kept(&self.recorder, &self.app, &[self.sale], &self.repeat).await;
        self.app.finish().await;
    }

    async fn steer(&self, url: &str, what: &str) {
        let operator = clock::new_id();
        let path = format!("/v1/sales/{}/{what}", self.sale);
        let kind = match what {
            "pause" => Kind::Pause,
            "resume" => Kind::Resume,
            _ => Kind::Close,
        };
        let token = self.app.token(operator, Role::Operator);
        let request = self.app.request(Method::POST, &path).bearer_auth(token);
        let request = redirected(request, url);
        let sale = self.sale.parse().unwrap();
        let outcome = self.recorder.ask(sale, kind, operator, "", request).await;
        assert!(matches!(outcome, Outcome::Ok { .. }), "{outcome:?}");
    }
}

fn buyers(count: usize) -> Vec<Uuid> {
    (0..count).map(|_| clock::new_id()).collect()
}

fn is_definite(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Ok { .. } => true,
        Outcome::Refused { code, .. } => code != "unavailable",
        Outcome::Unknown(_) => false,
    }
}

/// The body of a 201, and whether it was a replay.
#[track_caller]
fn accepted(outcome: Outcome) -> (String, bool) {
    match outcome {
        Outcome::Ok { body, replayed } => (body, replayed),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refusal(outcome: &Outcome) -> (&str, &Value) {
    match outcome {
        Outcome::Refused { code, problem, .. } => (code, problem),
        other => panic!("{other:?}"),
    }
}

/// Does this for all, so many at a time; gives what came of it in their order.
async fn at_most<'a, T, R>(
    width: usize,
    all: &'a [T],
    what: impl Fn(&'a T) -> BoxFuture<'a, R>,
) -> Vec<R> {
    futures::stream::iter(all.iter().map(what))
        .buffered(width)
        .collect()
        .await
}

/// A client's answers, or the node's, get lost half of the time: nobody gets two, and everybody gets
/// his own.
async fn half_of_the_answers_are_lost(shop: Shop, url: &str, proxy: &Proxy, words: &'static str) {
    let per_cent = 50;
    let lossy = Weather::Swallowed {
        to: words,
        per_cent,
    };
    proxy.weather(Weather::Clear, lossy);
    let buyers = buyers(150);
    let asking = at_most(16, &buyers, |buyer| {
        Box::pin(shop.insist(url, *buyer, ATTEMPTS))
    });
    timeout(PATIENCE * 2, asking).await.unwrap();
    assert!(
        proxy.counts.swallowed.load(Relaxed) > 10,
        "too few were lost"
    );
    proxy.clear();
    let first = shop.all_get_theirs(url, &buyers).await;
    let again = shop.all_get_theirs(url, &buyers).await;
    for ((body, _), (same, replayed)) in first.iter().zip(&again) {
        assert_eq!((body, true), (same, *replayed));
    }
    assert_eq!(stored(&shop.app, &shop.sale).await.len(), buyers.len());
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_lost_between_node_and_redis_buy_nothing_twice() {
    let mut app = App::start_behind_proxies(1).await;
    let proxies = app.proxies.take().unwrap();
    let terms = json!({ "allocation": 1_000, "per_buyer_limit": 5 });
    let shop = Shop::open(app, terms).await;
    let url = shop.app.url.clone();
    half_of_the_answers_are_lost(shop, &url, &proxies.redis, "EVALSHA").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_lost_between_client_and_node_buy_nothing_twice() {
    let terms = json!({ "allocation": 1_000, "per_buyer_limit": 5 });
    let shop = Shop::open(App::start().await, terms).await;
    let proxy = before(&shop.app.url, 2).await;
    let url = format!("http://127.0.0.1:{}", proxy.port());
    half_of_the_answers_are_lost(shop, &url, &proxy, "POST /v1/sales").await;
}

async fn before(url: &str, seed: u64) -> Proxy {
    let port = Url::parse(url).unwrap().port().unwrap();
    Proxy::before(port, seed).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_was_delivered_and_never_answered_has_one_effect() {
    let app = App::start_behind_proxies(3).await;
    let terms = json!({ "allocation": 1_000, "per_buyer_limit": 5 });
    let shop = Shop::open(app, terms).await;
    let url = shop.app.url.clone();
    // So that Redis knows the script: a call by its hash then runs at once.
    shop.all_get_theirs(&url, &buyers(1)).await;
    let redis = &shop.app.proxies.as_ref().unwrap().redis;
    let every_one = Weather::Swallowed {
        to: "EVALSHA",
        per_cent: 100,
    };
    redis.weather(Weather::Clear, every_one);
    let buyers = buyers(200);
    // Everybody goes on until one attempt has certainly been sent and has certainly no answer.
    let asking = at_most(8, &buyers, |buyer| {
        let (shop, url) = (&shop, &url);
        Box::pin(async move {
            while !matches!(shop.buy(url, *buyer, "k", 1).await, Outcome::Unknown(_)) {
                sleep(Duration::from_millis(5)).await;
            }
        })
    });
    timeout(PATIENCE * 2, asking).await.unwrap();
    redis.clear();
    let answers = shop.all_get_theirs(&url, &buyers).await;
    let replayed = answers.iter().filter(|(_, replayed)| *replayed).count();
    assert!(replayed > 100, "only {replayed} calls had been delivered");
    assert_eq!(stored(&shop.app, &shop.sale).await.len(), buyers.len() + 1);
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_keys_from_sixty_four_devices_each_have_one_effect() {
    let app = App::start().await;
    let node = app.node().await;
    let terms = json!({ "allocation": 200, "per_buyer_limit": 2 });
    let shop = Shop::open(app, terms).await;
    let urls = [shop.app.url.clone(), node.door().borrow().clone()];
    let buyers = buyers(50);
    for buyer in &buyers {
        let devices: Vec<_> = (0..64).collect();
        let answers = at_most(64, &devices, |device| {
            Box::pin(shop.buy(&urls[device % 2], *buyer, "k", 2))
        });
        let answers: Vec<_> = answers.await.into_iter().map(accepted).collect();
        let fresh = answers.iter().filter(|(_, replayed)| !replayed).count();
        assert_eq!((answers.len(), fresh), (64, 1));
        assert!(answers.iter().all(|(body, _)| *body == answers[0].0));
    }
    assert_eq!(stored(&shop.app, &shop.sale).await.len(), 50);
    node.stop().await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_belongs_to_what_it_asked_for_first() {
    let terms = json!({ "allocation": 100, "per_buyer_limit": 10 });
    let shop = Shop::open(App::start().await, terms).await;
    let url = shop.app.url.clone();
    let buyer = clock::new_id();
    // Three quantities under one key at once: one of them wins, whoever asks for it gets it.
    let devices: Vec<_> = (0..60).collect();
    let answers = at_most(60, &devices, |device| {
        Box::pin(shop.buy(&url, buyer, "k", device % 3 + 1))
    });
    let mut by_quantity: HashMap<u64, Vec<Outcome>> = HashMap::new();
    for (device, answer) in devices.iter().zip(answers.await) {
        by_quantity.entry(device % 3 + 1).or_default().push(answer);
    }
    let mut won = Vec::new();
    for (quantity, answers) in by_quantity {
        if let Outcome::Ok { .. } = answers[0] {
            won.push(quantity);
            let bodies: Vec<_> = answers.into_iter().map(accepted).collect();
            assert!(bodies.iter().all(|(body, _)| *body == bodies[0].0));
        } else {
            for answer in &answers {
                let (code, problem) = refusal(answer);
                assert_eq!(
                    (code, &problem["status"]),
                    ("idempotency_key_mismatch", &json!(422))
                );
            }
        }
    }
    let [quantity] = won[..] else {
        panic!("{won:?}");
    };
    // However the body is written, it asks for the same.
    for body in [
        format!("{{\"quantity\":{quantity}}}"),
        format!(" {{ \"quantity\" :\n {quantity} }} "),
    ] {
        let request = shop.app.purchase(&shop.sale, buyer, "k", body);
        let answer = send(request).await.expect(201);
        assert_eq!(answer.header("idempotency-replayed"), Some("true"));
    }
    let other = quantity % 3 + 1;
    let seen = shop.app.view(&shop.sale).await;
    refused(
        &shop.app.buy(&shop.sale, buyer, "k", other).await,
        422,
        "idempotency_key_mismatch",
    );
    assert_eq!(
        shop.app.view(&shop.sale).await["remaining"],
        seen["remaining"]
    );
    // To another buyer, and in another sale, it is another key.
    accepted(shop.buy(&url, clock::new_id(), "k", other).await);
    let elsewhere = shop.app.sale(json!({})).await;
    let elsewhere = shop.app.buy(id(&elsewhere), buyer, "k", 1).await;
    elsewhere.expect(201);
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_arrives_after_a_definite_answer_does_nothing() {
    let mut app = App::start_behind_proxies(4).await;
    // The second node has a good way of its own.
    let proxies = app.proxies.take().unwrap();
    let node = app.node().await;
    let terms = json!({ "allocation": 1_000, "per_buyer_limit": 5 });
    let shop = Shop::open(app, terms).await;
    let (bad, good) = (shop.app.url.clone(), node.door().borrow().clone());
    accepted(shop.buy(&bad, clock::new_id(), "k", 1).await);

    proxies.redis.weather(Weather::Stalled, Weather::Clear);
    let buyers = buyers(40);
    let given_up = at_most(40, &buyers, |buyer| {
        Box::pin(shop.buy(&bad, *buyer, "k", 1))
    });
    for outcome in given_up.await {
        assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
    }
    // Their deadline has passed, and so whatever is said now is for good.
    shop.steer(&good, "pause").await;
    shop.recorder.settle();
    let answers = at_most(40, &buyers, |buyer| {
        Box::pin(shop.buy(&good, *buyer, "k", 1))
    });
    for outcome in answers.await {
        assert_eq!(refusal(&outcome).0, "paused");
    }
    shop.steer(&good, "resume").await;
    // What was held reaches Redis while the sale is open, and comes too late.
    proxies.redis.clear();
    assert!(proxies.redis.counts.held.load(Relaxed) > 0);
    let works = async {
        while !is_definite(&shop.buy(&bad, clock::new_id(), "k", 1).await) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, works).await.unwrap();
    shop.app.ready().await;
    let seen = stored(&shop.app, &shop.sale).await;
    assert!(
        seen.iter().all(|row| !buyers.contains(&row.buyer)),
        "{seen:?}"
    );
    node.stop().await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gave_up_on_a_redis_that_stood_still_gets_one_order_elsewhere() {
    let app = App::start().await;
    let node = app.node().await;
    let terms = json!({ "allocation": 1_000, "per_buyer_limit": 5 });
    let shop = Shop::open(app, terms).await;
    let urls = [shop.app.url.clone(), node.door().borrow().clone()];
    accepted(shop.buy(&urls[0], clock::new_id(), "k", 1).await);
    accepted(shop.buy(&urls[1], clock::new_id(), "k", 1).await);

    let server = &shop.app.redis.server;
    server.signal(Signal::STOP);
    let buyers = buyers(40);
    for url in &urls {
        let given_up = at_most(40, &buyers, |buyer| Box::pin(shop.buy(url, *buyer, "k", 1)));
        for outcome in given_up.await {
            assert!(!is_definite(&outcome), "{outcome:?}");
        }
    }
    server.signal(Signal::CONT);
    let first = shop.all_get_theirs(&urls[1], &buyers).await;
    let again = shop.all_get_theirs(&urls[0], &buyers).await;
    for ((body, _), (same, _)) in first.iter().zip(&again) {
        assert_eq!(body, same);
    }
    assert_eq!(stored(&shop.app, &shop.sale).await.len(), 42);
    node.stop().await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_five_hundred_get_their_lost_answers_after_sell_out_and_after_the_end() {
    let terms = json!({ "allocation": 520, "per_buyer_limit": 1 });
    let shop = Shop::open(App::start().await, terms).await;
    let direct = shop.app.url.clone();
    shop.all_get_theirs(&direct, &buyers(20)).await;
    let proxy = before(&direct, 5).await;
    let lossy = format!("http://127.0.0.1:{}", proxy.port());
    let every_one = Weather::Swallowed {
        to: "POST /v1/sales",
        per_cent: 100,
    };
    proxy.weather(Weather::Clear, every_one);
    let buyers = buyers(500);
    let lost = at_most(64, &buyers, |buyer| {
        Box::pin(shop.buy(&lossy, *buyer, "k", 1))
    });
    for outcome in lost.await {
        assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
    }
    let stranger = shop.insist(&direct, clock::new_id(), 1).await.unwrap();
    assert_eq!(refusal(&stranger).0, "sold_out");
    let sold_out = shop.all_get_theirs(&direct, &buyers).await;
    shop.steer(&direct, "close").await;
    let closed = shop.all_get_theirs(&direct, &buyers).await;
    for ((body, replayed), (again, replayed_again)) in sold_out.iter().zip(&closed) {
        assert_eq!((body, replayed, replayed_again), (again, &true, &true));
    }
    shop.close().await;
}

/// Redis' own account of its keys: how many, and their bytes.
fn live_data(app: &App) -> (String, u64) {
    let url = app.redis.server.url().expose_secret();
    let script = "local sum = 0 for _, key in ipairs(redis.call('KEYS', '*')) do \
        sum = sum + redis.call('MEMORY', 'USAGE', key, 'SAMPLES', '0') end return sum";
    let bytes = redis(url, &format!("EVAL \"{script}\" 0"));
    let bytes = bytes.trim_start_matches(':').parse().unwrap();
    (redis(url, "DBSIZE"), bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_requests_with_fresh_keys_leave_nothing_in_redis() {
    let app = App::start().await;
    // One is sold out, which is refused from memory as well; the others always reach Redis.
    let mut sales = Vec::new();
    for (left, closed) in [(0, false), (1, false), (0, true)] {
        let terms = json!({ "allocation": 3, "per_buyer_limit": 3 });
        let sale = id(&app.sale(terms).await).to_owned();
        app.buy(&sale, clock::new_id(), "k", 3 - left)
            .await
            .expect(201);
        if closed {
            let path = format!("/v1/sales/{sale}/close");
            send(app.operate(Method::POST, &path)).await.expect(200);
        }
        stored(&app, &sale).await;
        sales.push(sale);
    }
    let wanted = variable("STOCKADE_TEST_REFUSED").unwrap_or(REFUSED);
    let before = live_data(&app);
    let done = AtomicU64::new(0);
    let refusing = (0..wanted).map(|number| {
        let (app, sales, done) = (&app, &sales, &done);
        async move {
            let sale = &sales[usize::try_from(number % 3).unwrap()];
            let key = format!("key-{number}");
            let answer = app.buy(sale, clock::new_id(), &key, 2).await;
            assert_eq!(answer.status, 409, "{answer:?}");
            done.fetch_add(1, Relaxed);
        }
    });
    let sending = futures::stream::iter(refusing).buffer_unordered(64);
    sending.collect::<()>().await;
    let after = live_data(&app);
    println!("{wanted} refused: {before:?} before, {after:?} after (keys, bytes)");
    assert_eq!(before, after);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_herd_at_the_opening_gets_nothing_early() {
    let app = App::start().await;
    let node = app.node().await;
    let opens_at = clock::now() + TimeDelta::milliseconds(1_500);
    let terms = json!({
        "allocation": 10_000, "per_buyer_limit": 1, "opens_at": opens_at,
    });
    let shop = Arc::new(Shop::open(app, terms).await);
    let opens_at: DateTime<Utc> = shop.app.view(&shop.sale).await["opens_at"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let urls = [shop.app.url.clone(), node.door().borrow().clone()];
    let early = AtomicU64::new(0);
    let people: Vec<_> = (0..64).collect();
    // Each asks until the first acceptance, with a new buyer each time, then twenty times more.
    let herd = at_most(64, &people, |number| {
        let (shop, url, early) = (&shop, &urls[number % 2], &early);
        Box::pin(async move {
            let mut bought = 0;
            while bought < 20 {
                let outcome = shop.buy(url, clock::new_id(), "k", 1).await;
                match &outcome {
                    Outcome::Ok { body, .. } => {
                        bought += 1;
                        let body: Value = serde_json::from_str(body).unwrap();
                        let at = body["accepted_at"].as_str().unwrap();
                        assert!(at.parse::<DateTime<Utc>>().unwrap() >= opens_at, "{at}");
                    }
                    refused => {
                        assert_eq!(refusal(refused).0, "not_open");
                        early.fetch_add(1, Relaxed);
                    }
                }
            }
        })
    });
    timeout(PATIENCE, herd).await.unwrap();
    let early = early.into_inner();
    assert!(early > 100, "only {early} came before the opening");
    // By Redis' own clock, too, it has opened.
    let url = shop.app.redis.server.url().expose_secret();
    let now = redis(url, "EVAL \"return redis.call('TIME')[1]\" 0");
    assert!(now.parse::<i64>().unwrap() >= opens_at.timestamp());
    node.stop().await;
    Arc::into_inner(shop).unwrap().close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_changes_all_the_time_loses_nothing() {
    let seed = seed();
    let repeat =
        format!("STOCKADE_TEST_SEED={seed} cargo test --test it network::a_network_that_changes");
    println!("repeat with {repeat}");
    let app = App::start_behind_proxies(seed).await;
    let node = app.node().await;
    let doors = vec![app.door(), node.door()];
    let market = Market::found(&app, 2, doors).await;
    let bustle = market.open(12, seed);
    let mut random = StdRng::seed_from_u64(seed);
    let proxies = app.proxies.as_ref().unwrap();
    for _ in 0..16 {
        let (proxy, words) = if random.random() {
            (&proxies.redis, "EVALSHA")
        } else {
            (&proxies.postgres, "COMMIT")
        };
        BadWeather::draw(&mut random, words).come(proxy);
        let ms = random.random_range(20..400);
        sleep(Duration::from_millis(ms)).await;
        if random.random_ratio(2, 3) {
            proxy.clear();
        }
    }
    proxies.redis.clear();
    proxies.postgres.clear();
    let selling = async {
        while !market.sells().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, selling).await.unwrap();
    bustle.close().await;
    market.settle(&app).await;
    for sale in &market.sales {
        stored(&app, sale).await;
    }
    assert_kept(&market.recorder, &app, &market.sales, &repeat).await;
    node.stop().await;
    app.finish().await;
}
