//! Torture: two real nodes, a Redis and a PostgreSQL behind proxies, a market that never rests, and
//! an adversary who breaks one thing after the other. After each blow everything sells again and every
//! audit passes; in the end the history is judged.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use rustix::process::Signal;
use tokio::time::{sleep, timeout};

use super::{
    embedded::redis,
    faults::lock_orders,
    support::{
        app::{App, PATIENCE, sql},
        history::assert_kept,
        market::{Bustle, Market},
        process::Served,
        proxy::{BadWeather, Proxy},
        seed,
        shim::Shim,
        variable,
        wire::Wire,
    },
};
use secrecy::ExposeSecret;

/// Buyers who are at it at the same time.
const BUYERS: usize = 12;

/// Seconds of torture when nobody asks for more.
const SECONDS: u64 = 20;

/// Kills when nobody asks for more.
const CYCLES: u64 = 6;

/// How long after its death a node is waited for no more, with a good margin.
const FORGOTTEN: Duration = Duration::from_mins(1);

/// What the adversary can do. A further one is a variant here, a line in [`Fault::ALL`] and an arm
/// in [`World::strike`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    NodeKilled,
    NodeStandsStill,
    NodeRestarted,
    RedisKilled,
    RedisStandsStill,
    RedisRestarted,
    RedisLosesPower,
    RedisEmptied,
    PostgresKilled,
    PostgresRestarted,
    BadWayToRedis,
    BadWayToPostgres,
    ScriptsForgotten,
    OrdersLocked,
    PositionSetBack,
}

impl Fault {
    const ALL: &[Self] = &[
        Self::NodeKilled,
        Self::NodeStandsStill,
        Self::NodeRestarted,
        Self::RedisKilled,
        Self::RedisStandsStill,
        Self::RedisRestarted,
        Self::RedisLosesPower,
        Self::RedisEmptied,
        Self::PostgresKilled,
        Self::PostgresRestarted,
        Self::BadWayToRedis,
        Self::BadWayToPostgres,
        Self::ScriptsForgotten,
        Self::OrdersLocked,
        Self::PositionSetBack,
    ];

    const KILLS: &[Self] = &[Self::NodeKilled, Self::RedisKilled, Self::PostgresKilled];
}

/// All there is.
struct World {
    app: App,
    nodes: Vec<Served>,
    bustle: Bustle,
    random: StdRng,
    /// The machine under Redis.
    shim: Shim,
    /// When a node was killed last.
    killed: Option<Instant>,
    /// How to do it all again.
    repeat: String,
}

impl World {
    async fn new(seed: u64, repeat: String) -> Self {
        let shim = Shim::new();
        let mut app = App::to_be_tormented(seed, &shim).await;
        app.set("STOCKADE_GRACE_SECONDS", "0");
        let mut nodes = Vec::new();
        for _ in 0..2 {
            nodes.push(Served::start(&app).await);
        }
        app.speak_to(nodes[0].url());
        let doors = nodes.iter().map(Served::door).collect();
        let market = Market::found(&app, 3, doors).await;
        Self {
            app,
            nodes,
            bustle: market.open(BUYERS, seed),
            random: StdRng::seed_from_u64(seed),
            shim,
            killed: None,
            repeat,
        }
    }

    fn market(&self) -> &Arc<Market> {
        &self.bustle.market
    }

    /// A while, of at most so many milliseconds.
    async fn a_while(&mut self, ms: u64) {
        let ms = self.random.random_range(ms / 10..=ms);
        sleep(Duration::from_millis(ms)).await;
    }

    /// Returns once so many more have an answer.
    async fn served(&self, more: u64) {
        let enough = self.market().served.load(Relaxed) + more;
        let serving = async {
            while self.market().served.load(Relaxed) < enough {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let done = timeout(PATIENCE, serving).await;
        assert!(done.is_ok(), "nobody is served any more");
    }

    /// Breaks something, and mends what does not mend itself.
    async fn strike(&mut self, fault: Fault) {
        let node = self.random.random_range(0..self.nodes.len());
        match fault {
            Fault::NodeKilled => {
                self.nodes[node].kill().await;
                self.killed = Some(Instant::now());
                self.a_while(300).await;
                self.nodes[node].start_again().await;
            }
            Fault::NodeStandsStill => {
                self.nodes[node].signal(Signal::STOP);
                self.a_while(4_000).await;
                self.nodes[node].signal(Signal::CONT);
            }
            Fault::NodeRestarted => {
                self.nodes[node].stop().await;
                self.nodes[node].start_again().await;
            }
            Fault::RedisKilled => {
                self.app.redis.server.kill().await;
                self.a_while(300).await;
                self.app.redis.server.restart().await.unwrap();
            }
            Fault::RedisStandsStill => {
                self.app.redis.server.signal(Signal::STOP);
                self.a_while(4_000).await;
                self.app.redis.server.signal(Signal::CONT);
            }
            Fault::RedisLosesPower => {
                self.app.redis.power_loss(&self.shim).await;
                self.a_while(300).await;
                self.app.redis.server.restart().await.unwrap();
            }
            Fault::RedisEmptied => {
                // Once everything is stored: what is not would be lost, as it must be.
                let silence = timeout(PATIENCE, self.market().silence()).await.unwrap();
                self.market().calm(&self.app).await;
                for sale in &self.market().sales {
                    self.app.audit(sale).await;
                }
                let url = self.app.redis.server.url().expose_secret();
                assert_eq!(redis(url, "FLUSHALL"), "+OK");
                drop(silence);
                // A node that was killed can no longer say how far it has seen: then an operator
                // decides. Nothing is missing, as the judge will see.
                if self.killed.is_some_and(|at| at.elapsed() < FORGOTTEN) {
                    self.market().sells_again(&self.app).await;
                }
            }
            Fault::RedisRestarted => self.app.redis.server.restart().await.unwrap(),
            Fault::PostgresKilled => {
                self.app.postgres.as_ref().unwrap().server.kill().await;
                self.a_while(300).await;
                self.restart_postgres().await;
            }
            Fault::PostgresRestarted => self.restart_postgres().await,
            Fault::BadWayToRedis | Fault::BadWayToPostgres => {
                let to = if fault == Fault::BadWayToRedis {
                    "EVALSHA"
                } else {
                    "COMMIT"
                };
                for _ in 0..self.random.random_range(1..=4) {
                    let change = BadWeather::draw(&mut self.random, to);
                    change.come(self.way(fault));
                    self.a_while(1_500).await;
                }
                self.way(fault).clear();
            }
            Fault::ScriptsForgotten => {
                let url = self.app.redis.server.url().expose_secret().to_owned();
                for _ in 0..self.random.random_range(1..=20) {
                    assert_eq!(redis(&url, "SCRIPT FLUSH"), "+OK");
                    self.a_while(50).await;
                }
            }
            Fault::OrdersLocked => {
                let _lock = lock_orders(&self.app, "ACCESS EXCLUSIVE").await;
                self.a_while(2_000).await;
            }
            Fault::PositionSetBack => {
                // To an entry that the journal still has: nobody can go on after one that was lost
                // with Redis and stored before.
                let mut wire = Wire::connect(&self.app.redis).await;
                let oldest = wire
                    .ask(&["XRANGE", "{p0}:journal", "-", "+", "COUNT", "1"])
                    .await;
                let Some((_, oldest)) = oldest.first().and_then(|id| id.split_once('-')) else {
                    return;
                };
                let back = "WITH kept AS (SELECT epoch, pseq FROM orders WHERE pseq >= $1
                                          ORDER BY pseq DESC LIMIT 50)
                    UPDATE journal_positions SET (position_epoch, position) = (kept.epoch, kept.pseq)
                    FROM (SELECT epoch, pseq FROM kept ORDER BY pseq LIMIT 1) AS kept";
                sqlx::query(back)
                    .bind(oldest.parse::<i64>().unwrap())
                    .execute(&mut sql(&self.app).await)
                    .await
                    .unwrap();
            }
        }
    }

    async fn restart_postgres(&mut self) {
        let postgres = self.app.postgres.as_mut().unwrap();
        postgres.server.restart().await.unwrap();
    }

    fn way(&self, fault: Fault) -> &Proxy {
        let proxies = self.app.proxies.as_ref().unwrap();
        if fault == Fault::BadWayToRedis {
            &proxies.redis
        } else {
            &proxies.postgres
        }
    }

    /// Waits until everything is as if nothing had happened: every node sells, people are served, and
    /// the audit of every sale passes. An audit that finds something wrong is wrong, unless a hand
    /// has just changed what it looks at.
    async fn recovered(&mut self, after: Fault) {
        self.app.speak_to(self.nodes[0].url());
        let selling = async {
            while !self.market().sells().await {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let sells = timeout(PATIENCE, selling).await;
        assert!(sells.is_ok(), "{after:?}: it does not sell again");
        self.served(20).await;
        // An audit passes only where nothing moves while it looks.
        let silence = timeout(PATIENCE, self.market().silence()).await;
        assert!(silence.is_ok(), "{after:?}: somebody never gets an answer");
        for sale in &self.market().sales {
            let path = format!("/v1/sales/{sale}/audit");
            let verdict = async |path: &str| {
                let done = |answer: &super::support::app::Answer| {
                    answer.status == 200 && answer.json()["verdict"] != "pending"
                };
                self.app.until(path, done).await.json()
            };
            let auditing = async {
                loop {
                    let audit = verdict(&path).await;
                    if audit["verdict"] == "pass" {
                        return;
                    }
                    assert!(after == Fault::PositionSetBack, "{after:?}: {audit:#}");
                    sleep(Duration::from_millis(20)).await;
                }
            };
            let passes = timeout(PATIENCE, auditing).await;
            assert!(passes.is_ok(), "{after:?}: the audit does not pass again");
        }
    }

    /// Everybody goes home, everything is asked again, and the history is judged.
    ///
    /// Gives how many attempts there were, and how many got a definite answer.
    async fn judge(mut self) -> (usize, u64) {
        let market = Arc::clone(self.market());
        self.bustle.close().await;
        market.settle(&self.app).await;
        for sale in &market.sales {
            let audit = self.app.audit(sale).await;
            assert_eq!(audit["verdict"], "pass", "{audit:#}");
        }
        assert_kept(&market.recorder, &self.app, &market.sales, &self.repeat).await;
        let attempts = market.recorder.history().attempts.len();
        self.app.finish().await;
        for node in &mut self.nodes {
            assert!(node.stop().await.success());
        }
        (attempts, market.served.load(Relaxed))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_breaks_and_nothing_is_lost_or_sold_twice() {
    let seed = seed();
    let seconds = variable("STOCKADE_TEST_SECONDS").unwrap_or(SECONDS);
    let repeat = format!("make torture SECONDS={seconds} SEED={seed}");
    println!("repeat with {repeat}");
    let mut world = World::new(seed, repeat).await;
    let begun = Instant::now();
    let mut blows = 0;
    while begun.elapsed().as_secs() < seconds {
        world.served(20).await;
        let fault = *Fault::ALL.choose(&mut world.random).unwrap();
        world.strike(fault).await;
        world.recovered(fault).await;
        blows += 1;
        println!("{:?} s: {fault:?}", begun.elapsed().as_secs());
    }
    let (attempts, served) = world.judge().await;
    println!("{blows} blows, {attempts} attempts, {served} answered: nothing lost or sold twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_are_killed_again_and_again_and_nothing_is_lost_or_sold_twice() {
    let seed = seed();
    let cycles = variable("STOCKADE_TEST_CYCLES").unwrap_or(CYCLES);
    let repeat = format!("make kills CYCLES={cycles} SEED={seed}");
    println!("repeat with {repeat}");
    let mut world = World::new(seed, repeat).await;
    let begun = Instant::now();
    for (cycle, fault) in (1..=cycles).zip(Fault::KILLS.iter().cycle()) {
        let more = world.random.random_range(1..60);
        world.served(more).await;
        world.strike(*fault).await;
        world.recovered(*fault).await;
        println!(
            "{cycle} of {cycles}, {:?} s: {fault:?}",
            begun.elapsed().as_secs()
        );
    }
    let (attempts, served) = world.judge().await;
    println!("{cycles} kills, {attempts} attempts, {served} answered: nothing lost or sold twice");
}
