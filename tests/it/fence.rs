//! Everything that keeps a call from having an effect, each by itself: timeline, server, entries
//! seen, clock, deadline, window, and keys that are not as the round says. An engine with nobody
//! who verifies its partition, on a real Redis.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};
use stockade::{
    domain::{
        id::{BuyerId, Epoch, Fingerprint, OperationId, OrderId, Partition, RoundId, SaleNumber},
        limits::{CALL_ITEMS_MAX, CALL_ROUNDS_MAX},
        model::Provisioned,
        money::{Currency, Money},
        order::{Decision, Durability, Purchase, Refusal},
        round::{Intent, Policy, Terms, Window},
    },
    engine::{Engine, EngineError},
};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::support::{
    self, Redis,
    app::PATIENCE,
    cancel,
    proxy::{Proxy, Weather},
    restock,
    wire::Wire,
};

const PARTITION: Partition = Partition(0);
const EPOCH: Epoch = Epoch(1);
const ACTOR: Uuid = Uuid::from_u128(0xac);
const SECOND: i64 = 1_000;

fn round(sale: u32) -> RoundId {
    RoundId {
        sale: SaleNumber(sale),
        round: 1,
    }
}

fn terms(opens_at_ms: i64, closes_at_ms: Option<i64>) -> Terms {
    Terms {
        window: Window {
            opens_at_ms,
            closes_at_ms,
        },
        per_buyer_limit: 5,
        per_order_limit: 5,
        unit_price: Money::new(1999, Currency::parse("EUR").unwrap()).unwrap(),
        allocation: 10,
        policy: Policy::default(),
    }
}

fn item(sale: u32, buyer: u128) -> Purchase {
    let buyer = BuyerId(Uuid::from_u128(buyer));
    Purchase {
        round: round(sale),
        order: OrderId::derive(SaleNumber(sale), buyer, "k"),
        buyer,
        quantity: 1,
        fingerprint: Fingerprint([1; 8]),
        durability: Durability::Fsync,
        redeem: false,
        archive: 0,
    }
}

/// A Redis with one open round and an order in it.
struct Counter {
    redis: Redis,
    engine: Engine,
    wire: Wire,
}

impl Counter {
    async fn open() -> Self {
        let redis = Redis::start().await;
        let engine = support::engine(&redis, PARTITION).await;
        let wire = Wire::connect(&redis).await;
        let counter = Self {
            redis,
            engine,
            wire,
        };
        counter.provision(1, &terms(1, None)).await;
        assert!(matches!(counter.buy(1, 1).await, Ok(Decision::Accepted(_))));
        counter
    }

    async fn provision(&self, sale: u32, terms: &Terms) {
        let provisioned = self.engine.provision(round(sale), terms).await.unwrap();
        assert_eq!(provisioned, Provisioned::Created);
    }

    async fn buy(&self, sale: u32, buyer: u128) -> Result<Decision, EngineError> {
        let answer = self.engine.purchase(item(sale, buyer)).await;
        answer.map(|answer| answer.decision)
    }

    /// Everything that Redis holds, as one number.
    async fn digest(&mut self) -> String {
        let script = "local keys, sums = redis.call('KEYS', '*'), {}
            table.sort(keys)
            for i, key in ipairs(keys) do sums[i] = redis.sha1hex(key .. redis.call('DUMP', key)) end
            return redis.status_reply(redis.sha1hex(table.concat(sums)))";
        self.wire.run(&["EVAL", script, "0"]).await
    }

    /// Opens the node's own fence, as recovery does after it has looked; its idea of Redis' clock is
    /// off by so much.
    async fn adopt(&self, off_ms: i64) {
        let mut inspection = self.engine.inspect().await.unwrap();
        inspection.now_ms += off_ms;
        self.engine.adopt(EPOCH, &inspection);
    }

    /// Redis never goes behind an instant that it has stamped: this makes it that instant.
    async fn set_clock(&mut self, ms: i64) {
        let text = ms.to_string();
        self.wire
            .run(&["HSET", "{p0}:meta", "last_ms", &text])
            .await;
        self.adopt(0).await;
    }

    /// Every call of an engine on the round of sale 1, each a new one to the fence, gives this error
    /// and changes nothing.
    async fn assert_all_refused(&mut self, off_ms: i64, refused: impl Fn(&EngineError) -> bool) {
        let before = self.digest().await;
        let engine = &self.engine;
        let operation = OperationId::derive("restock", ACTOR, "k");
        let fingerprint = Fingerprint([2; 8]);
        let order = item(1, 1).order;
        let (first, second) = (round(1), round(2));
        let fresh = terms(1, None);
        let calls: [(&str, BoxFuture<'_, Option<EngineError>>); 8] = [
            ("purchase", self.buy(1, 2).map(Result::err).boxed()),
            (
                "cancel",
                cancel(engine, first, order, ACTOR).map(Result::err).boxed(),
            ),
            (
                "restock",
                restock(engine, first, 3, operation, fingerprint, ACTOR)
                    .map(Result::err)
                    .boxed(),
            ),
            (
                "control",
                engine
                    .control(first, Intent::Paused, ACTOR)
                    .map(Result::err)
                    .boxed(),
            ),
            (
                "provision",
                engine.provision(second, &fresh).map(Result::err).boxed(),
            ),
            ("snapshot", engine.snapshot(first).map(Result::err).boxed()),
            ("order", engine.order(order).map(Result::err).boxed()),
            (
                "leaderboard",
                engine.leaderboard(first, 0, 0, 10).map(Result::err).boxed(),
            ),
        ];
        for (name, call) in calls {
            self.adopt(off_ms).await;
            let error = call.await.unwrap_or_else(|| panic!("{name} was let in"));
            assert!(refused(&error), "{name}: {error:?}");
            assert!(!error.may_have_run());
        }
        assert_eq!(self.digest().await, before);
    }
}

/// The fence is closed for this reason.
fn fenced(reason: &str) -> impl Fn(&EngineError) -> bool {
    let expected = EngineError::Fenced(reason.to_owned());
    move |error| *error == expected
}

#[tokio::test]
async fn a_call_of_an_older_epoch_is_not_let_in() {
    let mut counter = Counter::open().await;
    let newer = support::connect(&counter.redis, PARTITION).await;
    let inspection = newer.inspect().await.unwrap();
    let begun = newer.install(Epoch(2), &inspection).await.unwrap();
    newer.open(begun, &inspection);
    counter.assert_all_refused(0, fenced("epoch")).await;
    let answer = newer.purchase(item(1, 2)).await.unwrap();
    assert!(matches!(answer.decision, Decision::Accepted(_)));
}

#[tokio::test]
async fn a_server_that_was_started_anew_sells_nothing() {
    let mut counter = Counter::open().await;
    counter.redis.server.kill().await;
    counter.redis.server.restart().await.unwrap();
    counter.wire = Wire::connect(&counter.redis).await;
    let connected = async {
        while counter.engine.inspect().await.is_err() {
            tokio::task::yield_now().await;
        }
        // Every connection notices for itself.
        loop {
            counter.adopt(0).await;
            let crowd = counter.buy(1, 3).await;
            counter.adopt(0).await;
            let reads = counter.engine.order(item(1, 1).order).await;
            let fenced = |error: &EngineError| matches!(error, EngineError::Fenced(_));
            if crowd.as_ref().err().is_none_or(fenced) && reads.as_ref().err().is_none_or(fenced) {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, connected).await.unwrap();
    counter.assert_all_refused(0, fenced("incarnation")).await;
}

#[tokio::test]
async fn a_server_that_is_behind_what_was_seen_sells_nothing() {
    let mut counter = Counter::open().await;
    let seen = counter.engine.floor();
    let text = (seen.pseq - 1).to_string();
    counter
        .wire
        .run(&["HSET", "{p0}:meta", "pseq", &text])
        .await;
    counter.assert_all_refused(0, fenced("behind")).await;
    assert_eq!(counter.engine.floor(), seen);
}

#[tokio::test]
async fn a_clock_far_behind_the_estimate_is_no_fact() {
    let mut counter = Counter::open().await;
    counter
        .assert_all_refused(6 * SECOND, fenced("clock"))
        .await;
}

#[tokio::test]
async fn a_call_that_comes_late_has_no_effect() {
    let mut counter = Counter::open().await;
    let expired = |error: &EngineError| *error == EngineError::Expired;
    counter.assert_all_refused(-3 * SECOND, expired).await;
}

#[tokio::test]
async fn the_estimate_of_redis_clock_is_never_ahead_of_it() {
    let mut counter = Counter::open().await;
    // Redis holds back what it is asked, and then answers with its clock.
    counter.wire.run(&["CLIENT", "PAUSE", "500", "ALL"]).await;
    counter.adopt(0).await;
    let estimate_ms = counter.engine.redis_ms().unwrap();
    let time = counter.wire.ask(&["TIME"]).await;
    let [seconds, micros] = [0, 1].map(|at| time[at].parse::<i64>().unwrap());
    let redis_ms = seconds * SECOND + micros / 1_000;
    assert!(estimate_ms <= redis_ms, "{estimate_ms} {redis_ms}");
}

#[tokio::test]
async fn redis_clock_decides_and_nobody_elses() {
    let mut counter = Counter::open().await;
    let opens_at_ms = counter.engine.inspect().await.unwrap().now_ms + 60 * SECOND;
    counter.provision(2, &terms(opens_at_ms, None)).await;
    // Three seconds ahead is not so much that it is a fault.
    counter.set_clock(opens_at_ms - 2 * SECOND).await;
    counter.adopt(3 * SECOND).await;
    let refusal = Refusal::NotOpen { opens_at_ms };
    assert_eq!(counter.buy(2, 1).await, Ok(Decision::Refused(refusal)));
}

#[tokio::test]
async fn the_window_has_its_first_and_not_its_last_millisecond() {
    let mut counter = Counter::open().await;
    let opens_at_ms = counter.engine.inspect().await.unwrap().now_ms + 60 * SECOND;
    let closes_at_ms = opens_at_ms + 60 * SECOND;
    counter
        .provision(2, &terms(opens_at_ms, Some(closes_at_ms)))
        .await;
    let not_open = Decision::Refused(Refusal::NotOpen { opens_at_ms });
    counter.set_clock(opens_at_ms - 1).await;
    assert_eq!(counter.buy(2, 1).await, Ok(not_open));
    for (buyer, instant) in [(2, opens_at_ms), (3, closes_at_ms - 1)] {
        counter.set_clock(instant).await;
        let Ok(Decision::Accepted(order)) = counter.buy(2, buyer).await else {
            panic!("inside the window");
        };
        assert_eq!(order.accepted_at_ms, instant);
    }
    counter.set_clock(closes_at_ms).await;
    assert_eq!(
        counter.buy(2, 4).await,
        Ok(Decision::Refused(Refusal::Closed))
    );
}

#[tokio::test]
async fn a_round_that_is_not_whole_sells_nothing_and_is_not_made_anew() {
    let mut counter = Counter::open().await;
    let order = item(1, 1).order;
    let damages: [(&str, &[&str]); 6] = [
        ("round:N.1", &["DEL"]),
        ("round:N.1:buyers", &["DEL"]),
        ("round:N.1:board", &["DEL"]),
        ("sale:N", &["DEL"]),
        ("sale:N:orders", &["DEL"]),
        // Units that nobody has.
        ("round:N.1", &["HINCRBY", "remaining", "1"]),
    ];
    for (sale, (key, damage)) in (2..).zip(damages) {
        counter.provision(sale, &terms(1, None)).await;
        assert!(matches!(
            counter.buy(sale, 1).await,
            Ok(Decision::Accepted(_))
        ));
        let key = format!("{{p0}}:{}", key.replace('N', &sale.to_string()));
        let mut words = damage.to_vec();
        words.insert(1, &key);
        counter.wire.run(&words).await;
        let pseq = counter.engine.inspect().await.unwrap().pseq;
        // Also who has an order already.
        for buyer in [1, 2] {
            let bought = counter.buy(sale, buyer).await;
            assert!(
                matches!(bought, Err(EngineError::Damaged(_))),
                "{key}: {bought:?}"
            );
        }
        let cancelled = cancel(&counter.engine, round(sale), order, ACTOR).await;
        assert!(matches!(cancelled, Err(EngineError::Damaged(_))), "{key}");
        if key.ends_with(".1") && damage == ["DEL"] {
            let anew = counter.engine.provision(round(sale), &terms(1, None)).await;
            assert!(matches!(anew, Err(EngineError::Damaged(_))), "{anew:?}");
        }
        assert_eq!(counter.engine.inspect().await.unwrap().pseq, pseq);
        // Others go on, in the same call.
        let (broken, whole) =
            tokio::join!(counter.buy(sale, 3), counter.buy(1, u128::from(sale) * 100));
        assert!(matches!(broken, Err(EngineError::Damaged(_))), "{broken:?}");
        assert!(matches!(whole, Ok(Decision::Accepted(_))), "{whole:?}");
    }
}

#[tokio::test]
async fn without_a_journal_nothing_happens() {
    for damage in [&["DEL", "{p0}:journal"][..], &["SET", "{p0}:journal", "x"]] {
        let mut counter = Counter::open().await;
        counter.wire.run(damage).await;
        let before = counter.digest().await;
        let reason = EngineError::Fenced("journal".to_owned());
        assert_eq!(counter.buy(1, 2).await, Err(reason));
        assert_eq!(counter.digest().await, before);
    }
}

/// Asks until the answer says so.
async fn until(wire: &mut Wire, words: &[&str], said: impl Fn(&str) -> bool) {
    let asking = async {
        while !wire.ask(words).await.iter().any(|answer| said(answer)) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, asking).await.unwrap();
}

#[tokio::test]
async fn an_error_that_one_call_gets_is_no_refusal_of_the_others() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bus = free.local_addr().unwrap().port().to_string();
    drop(free);
    let mut redis = Redis::start_with(|options| {
        for (name, value) in [
            ("cluster-enabled", "yes"),
            ("cluster-port", &bus),
            ("cluster-require-full-coverage", "no"),
        ] {
            options.settings.push((name.to_owned(), value.to_owned()));
        }
    })
    .await;
    let mut wire = Wire::connect(&redis).await;
    let serves = |info: &str| info.contains("cluster_state:ok");
    wire.run(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    let slot = wire.run(&["CLUSTER", "KEYSLOT", "{p0}"]).await;
    until(&mut wire, &["CLUSTER", "INFO"], serves).await;
    let proxy = Proxy::before(redis.server.port(), 1).await;
    redis.address = proxy.url(redis.server.url());
    let engine = support::engine(&redis, PARTITION).await;
    let mut counter = Counter {
        redis,
        engine,
        wire,
    };
    counter.provision(1, &terms(1, None)).await;
    counter.buy(1, 1).await.unwrap();

    // One call is refused, the next one on the same connection has its effect, and then the client
    // hears of both.
    proxy.weather(Weather::Clear, Weather::Stalled);
    counter.wire.run(&["CLUSTER", "DELSLOTS", &slot]).await;
    let (engine, wire) = (&counter.engine, &mut counter.wire);
    let after = async {
        let refused = |info: &str| info.contains("errorstat_CLUSTERDOWN");
        until(wire, &["INFO", "errorstats"], refused).await;
        wire.run(&["CLUSTER", "ADDSLOTS", &slot]).await;
        let heard = async {
            let orders = ["HLEN", "{p0}:sale:1:orders"];
            until(wire, &orders, |orders| orders == "2").await;
            proxy.clear();
        };
        tokio::join!(engine.purchase(item(1, 3)), heard).0
    };
    let (refused, accepted) = tokio::join!(engine.purchase(item(1, 2)), after);
    assert!(refused.is_err(), "{refused:?}");
    if let Err(error) = accepted {
        assert!(error.may_have_run(), "{error}");
    }
    drop(counter.redis);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_call_is_short() {
    let redis = Redis::start().await;
    let engine = support::engine(&redis, PARTITION).await;
    let rounds = u32::try_from(CALL_ROUNDS_MAX).unwrap();
    for sale in 1..=rounds {
        let terms = Terms {
            allocation: 1_000_000,
            policy: Policy::default(),
            ..terms(1, None)
        };
        engine.provision(round(sale), &terms).await.unwrap();
    }
    let mut wire = Wire::connect(&redis).await;
    wire.run(&["CONFIG", "RESETSTAT"]).await;
    let items = 100 * CALL_ITEMS_MAX as u128;
    // The same buyers in every round: each item looks for one that is there.
    let buying = (0..items).map(|n| {
        let sale = u32::try_from(n % u128::from(rounds)).unwrap() + 1;
        engine.purchase(item(sale, n))
    });
    for answer in futures::future::join_all(buying).await {
        assert!(matches!(answer.unwrap().decision, Decision::Accepted(_)));
    }
    let figure = |text: &str, line: &str, name: &str| -> f64 {
        let line = text.lines().find(|it| it.starts_with(line)).unwrap();
        let at = line.split([':', ',']).find_map(|it| it.strip_prefix(name));
        at.unwrap().parse().unwrap()
    };
    let stats = wire.ask(&["INFO", "commandstats"]).await.remove(0);
    let calls = figure(&stats, "cmdstat_evalsha:", "calls=");
    let mean = figure(&stats, "cmdstat_evalsha:", "usec_per_call=");
    let latency = wire.ask(&["INFO", "latencystats"]).await.remove(0);
    let at = |name: &str| figure(&latency, "latency_percentiles_usec_evalsha:", name);
    println!(
        "{calls} calls for {items} purchases in {rounds} rounds: mean {mean} us, p50 {} us, p99 {} us, \
         p99.9 {} us",
        at("p50="),
        at("p99="),
        at("p99.9=")
    );
    // All but the first ones were full.
    assert!(calls < 110.0, "{calls} calls were not the largest");
    // Half of the time after which Redis would answer BUSY to everybody; nothing is asked more of a
    // machine that others use.
    assert!(at("p99.9=") < 2_500_000.0);
}
