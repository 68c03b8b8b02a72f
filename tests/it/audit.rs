//! The auditor between real stores: what it must find, what it must not, and how it tells.

use std::{process::Output, sync::Arc, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stockade::{
    clock,
    domain::{
        durability::Said,
        hurdles::Hurdles,
        id::{
            BuyerId, Epoch, Fingerprint, JournalId, OperationId, OrderId, Partition, ProductId,
            RoundId, SaleId,
        },
        model::Provisioned,
        money::{Currency, Money},
        order::{Decision, Durability, Mode, Purchase},
        round::{Intent, Policy, Terms, Window},
    },
    engine::{Engine, EngineError, EngineOptions, Engines},
    metrics::{AuditMetrics, CheckLabels, EngineMetrics},
    ops::auditor::{AuditError, Auditor, CheckName, Patrol, RoundReport, Status},
    store::{
        Database, DatabaseSettings,
        journal::{Ledger, Positions},
        rounds::Rounds,
        sales::{Inserted, NewSale, SaleFacts, Sales},
    },
    writer::Writer,
};
use tokio::{
    process::Command,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    embedded::redis,
    support::{
        self, Redis,
        app::{App, id},
        cancel, restock,
    },
};

const PARTITION: Partition = Partition(0);
const ACTOR: Uuid = Uuid::from_u128(0xac);
const PATIENCE: Duration = Duration::from_secs(30);

/// A sale on stores of its own, with nobody draining its journal, and its auditor.
struct Stall {
    facts: Arc<SaleFacts>,
    engines: Engines,
    auditor: Auditor,
    database: Database,
    sql: PgConnection,
    database_url: SecretString,
    redis: Redis,
}

impl Stall {
    async fn open() -> Self {
        let (redis, database_url) = tokio::join!(Redis::start(), support::database());
        let url = database_url.expose_secret();
        let database = Database::new(url, DatabaseSettings::default()).unwrap();
        let mut sql = PgConnection::connect(url).await.unwrap();
        let positions = Positions::new(database.clone());
        positions
            .raise_epoch(PARTITION, Epoch::default(), Epoch::default(), 0, None)
            .await
            .unwrap()
            .unwrap();
        let engine = support::engine(&redis, PARTITION).await;
        assert!(positions.set_installed(PARTITION, Epoch(1)).await.unwrap());

        let product = clock::new_id();
        sqlx::query(
            "INSERT INTO products (id, name, description, price_amount, price_currency, created_at,
                                   updated_at)
             VALUES ($1, 'Kettle', '', 1999, 'EUR', now(), now())",
        )
        .bind(product)
        .execute(&mut sql)
        .await
        .unwrap();
        let sale = NewSale {
            id: SaleId(clock::new_id()),
            fingerprint: Fingerprint::of(&[b"kettle"]),
            partition: PARTITION,
            product: ProductId(product),
            name: "Kettle".to_owned(),
            small_print: None,
            durability: Mode::Default,
            payment: None,
            refund_returns_units: true,
            hurdles: Hurdles::default(),
            terms: Terms {
                window: Window {
                    opens_at_ms: 1,
                    closes_at_ms: None,
                },
                per_buyer_limit: 10,
                per_order_limit: 10,
                unit_price: Money::new(1999, Currency::parse("EUR").unwrap()).unwrap(),
                allocation: 5_000,
                policy: Policy::default(),
            },
            schedule: None,
            created_by: ACTOR,
        };
        let inserted = Sales::new(database.clone()).insert(sale).await.unwrap();
        let Inserted::New(sale) = inserted else {
            panic!("{inserted:?}")
        };
        let engines = Engines::new(vec![engine]);
        Self {
            auditor: Auditor::new(database.clone(), engines.clone()),
            facts: sale.facts,
            engines,
            database,
            sql,
            database_url,
            redis,
        }
    }

    /// With a round in Redis.
    async fn provisioned() -> Self {
        let stall = Self::open().await;
        stall.provision().await;
        stall
    }

    async fn provision(&self) {
        let engine = self.engines.of(PARTITION).unwrap();
        let provisioned = engine.provision(self.round(), &self.facts.terms).await;
        assert_eq!(provisioned, Ok(Provisioned::Created));
        let rounds = Rounds::new(self.database.clone());
        assert!(
            rounds
                .set_provisioned(self.round(), clock::now())
                .await
                .unwrap()
        );
    }

    fn round(&self) -> RoundId {
        self.facts.round_id()
    }

    fn purchase(&self, buyer: u128, key: u32, quantity: u64) -> Purchase {
        let buyer = BuyerId(Uuid::from_u128(buyer));
        Purchase {
            round: self.round(),
            order: OrderId::derive(self.facts.number, buyer, &key.to_string()),
            buyer,
            quantity,
            fingerprint: Fingerprint::of(&[&quantity.to_be_bytes()]),
            durability: Durability::Fsync,
            redeem: false,
            archive: 0,
        }
    }

    async fn buy(&self, buyer: u128, key: u32, quantity: u64) -> OrderId {
        let engine = self.engines.of(PARTITION).unwrap();
        let item = self.purchase(buyer, key, quantity);
        let answer = engine.purchase(item).await.unwrap();
        let Decision::Accepted(order) = answer.decision else {
            panic!("{answer:?}")
        };
        order.id
    }

    /// Buyers buy and give back, and the operator restocks, pauses and resumes.
    async fn busy_day(&self, buyers: std::ops::Range<u128>) {
        let engine = self.engines.of(PARTITION).unwrap();
        let operation = OperationId::derive("restock", ACTOR, &buyers.start.to_string());
        for buyer in buyers {
            // One is the first for certain; which of several that wait together is, nobody knows.
            let mut orders = vec![self.buy(buyer, 0, 2).await];
            let more = (1..4).map(|key| self.buy(buyer, key, 2));
            orders.extend(futures::future::join_all(more).await);
            let cancelled = cancel(engine, self.round(), orders[1], ACTOR).await;
            cancelled.unwrap();
        }
        let fingerprint = Fingerprint::of(&[b"25"]);
        let restocked = restock(engine, self.round(), 25, operation, fingerprint, ACTOR);
        restocked.await.unwrap();
        for intent in [Intent::Paused, Intent::Live] {
            engine.control(self.round(), intent, ACTOR).await.unwrap();
        }
    }

    /// Starts a writer; the tokens stop it.
    async fn writer(&self) -> (Writer, CancellationToken) {
        let reader = self.engines.of(PARTITION).unwrap().journal_reader().await;
        let ledger = Ledger::new(&self.database, PARTITION);
        (
            Writer::new(ledger, reader.unwrap()),
            CancellationToken::new(),
        )
    }

    /// Stores everything that the journal has.
    async fn drain(&self) {
        let (writer, stop) = self.writer().await;
        let mut stored = writer.stored();
        let task = tokio::spawn(writer.run(stop.clone(), CancellationToken::new()));
        let inspection = self.engines.of(PARTITION).unwrap().inspect().await.unwrap();
        let end = JournalId {
            epoch: inspection.epoch.unwrap(),
            pseq: inspection.pseq,
        };
        assert!(timeout(PATIENCE, stored.reached(end)).await.unwrap());
        stop.cancel();
        task.await.unwrap();
    }

    async fn audit(&self) -> RoundReport {
        let report = self.auditor.round(&self.facts, 1).await.unwrap();
        report.unwrap()
    }

    async fn sql(&mut self, statement: &str) {
        let done = sqlx::raw_sql(AssertSqlSafe(statement.to_owned()));
        done.execute(&mut self.sql).await.unwrap();
    }

    fn redis(&self, command: &str) {
        // Buyer 1, six units in four acceptances, and an order that was not given back.
        let buyer = Uuid::from_u128(1);
        let order = OrderId::derive(self.facts.number, BuyerId(buyer), "0");
        let command = command
            .replace("ROUND", "{p0}:round:1.1")
            .replace("FIRST-BUYER", &quoted(buyer.as_bytes()))
            .replace("WHOLE", &quoted(&[0, 0, 0, 6, 0, 0, 0, 4]))
            .replace("FIRST", &quoted(order.0.as_bytes()));
        let reply = redis(self.redis.server.url().expose_secret(), &command);
        assert!(!reply.starts_with('-'), "{command}: {reply}");
    }

    /// Does what a command line says: to Redis, or to PostgreSQL.
    async fn tamper(&mut self, command: &str) {
        match command.strip_prefix("SQL ") {
            Some(statement) => self.sql(statement).await,
            None => self.redis(command),
        }
        // As a node does all the time.
        let engine = self.engines.of(PARTITION).unwrap();
        engine.read_settings().await.unwrap();
    }

    /// The command line, as an operator calls it.
    async fn command(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_stockade"))
            .arg("audit")
            .args(arguments)
            .env("REDIS_URL", self.redis.server.url().expose_secret())
            .env("DATABASE_URL", self.database_url.expose_secret())
            .kill_on_drop(true)
            .output()
            .await
            .unwrap()
    }
}

/// Bytes as Redis' inline commands take them.
fn quoted(bytes: &[u8]) -> String {
    let bytes = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
    format!("\"{}\"", bytes.collect::<String>())
}

fn names(report: &RoundReport, status: Status) -> Vec<CheckName> {
    let checks = report.checks.iter();
    let mut names: Vec<_> = checks
        .filter(|check| check.status == status)
        .map(|check| check.name)
        .collect();
    names.sort_unstable();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_is_pending_until_all_is_stored_and_passes_then() {
    let stall = Stall::open().await;
    let report = stall.audit().await;
    assert_eq!(report.verdict, Status::Pending, "{report:#?}");
    stall.provision().await;
    stall.busy_day(1..8).await;
    let report = stall.audit().await;
    assert_eq!(
        names(&report, Status::Pending),
        [
            CheckName::PostgresRedis,
            CheckName::Line,
            CheckName::Orders,
            CheckName::Leaderboard,
            CheckName::Buyers
        ],
        "{report:#?}"
    );
    assert_eq!(report.verdict, Status::Pending);
    stall.drain().await;
    let report = stall.audit().await;
    assert_eq!(report.verdict, Status::Pass, "{report:#?}");
    assert_eq!(report.checks.len(), CheckName::ALL.len());
    for (name, shown) in [
        (CheckName::Orders, "28 orders, "),
        (CheckName::Leaderboard, "21 places"),
        (CheckName::Buyers, "7 buyers"),
    ] {
        let mut checks = report.checks.iter();
        let check = checks.find(|check| check.name == name).unwrap();
        assert!(check.actual.starts_with(shown), "{check:?}");
        assert_eq!(check.expected, check.actual);
    }

    let none = stall.auditor.round(&stall.facts, 2).await.unwrap();
    assert_eq!(none, None);
    let none = stall.auditor.sale(SaleId(Uuid::nil()), None).await.unwrap();
    assert_eq!(none, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_seeded_corruption_is_found_and_forgotten_when_it_is_mended() {
    use CheckName as N;
    let mut stall = Stall::provisioned().await;
    stall.busy_day(1..8).await;
    stall.drain().await;
    stall
        .sql("CREATE TABLE kept AS SELECT * FROM orders WHERE seq = 1")
        .await;
    for (damage, mend, expected) in [
        (
            "HINCRBY ROUND sold 1",
            "HINCRBY ROUND sold -1",
            &[
                N::Conservation,
                N::RedisKeys,
                N::RedisJournal,
                N::PostgresRedis,
            ][..],
        ),
        (
            "HINCRBY ROUND allocation -3",
            "HINCRBY ROUND allocation 3",
            &[
                N::Conservation,
                N::RedisKeys,
                N::RedisJournal,
                N::PostgresRedis,
            ],
        ),
        (
            "HSET ROUND seq 3",
            "HSET ROUND seq 38",
            &[N::RedisJournal, N::PostgresRedis, N::PostgresNotAhead],
        ),
        (
            "HSET ROUND intent paused",
            "HSET ROUND intent live",
            &[N::PostgresRedis],
        ),
        (
            "HSET ROUND:buyers nobody 1",
            "HDEL ROUND:buyers nobody",
            &[N::RedisKeys, N::Buyers],
        ),
        (
            "RENAME ROUND:board ROUND:lost",
            "RENAME ROUND:lost ROUND:board",
            &[N::RedisKeys, N::Leaderboard],
        ),
        (
            "RENAME {p0}:sale:1:orders ROUND:lost",
            "RENAME ROUND:lost {p0}:sale:1:orders",
            &[N::RedisKeys, N::Orders],
        ),
        (
            "RENAME ROUND ROUND:lost",
            "RENAME ROUND:lost ROUND",
            &[
                N::Conservation,
                N::Bounds,
                N::RedisKeys,
                N::RedisJournal,
                N::PostgresRedis,
                N::PostgresNotAhead,
            ],
        ),
        (
            "SQL UPDATE rounds SET remaining = remaining + 1, sold = sold - 1",
            "SQL UPDATE rounds SET remaining = remaining - 1, sold = sold + 1",
            &[N::PostgresRedis, N::PostgresSums],
        ),
        (
            "SQL UPDATE rounds SET pseq = pseq + 5",
            "SQL UPDATE rounds SET pseq = pseq - 5",
            &[N::PostgresRedis, N::PostgresNotAhead, N::PostgresPosition],
        ),
        (
            "SQL UPDATE rounds SET pseq = pseq - 1",
            "SQL UPDATE rounds SET pseq = pseq + 1",
            &[N::PostgresRedis],
        ),
        (
            "SQL UPDATE journal_positions SET position = position + 100",
            "SQL UPDATE journal_positions SET position = position - 100",
            &[N::PostgresNotAhead],
        ),
        (
            "SQL UPDATE orders SET quantity = 3 WHERE seq = 1",
            "SQL UPDATE orders SET quantity = 2 WHERE seq = 1",
            &[N::PostgresSums, N::Orders, N::Buyers],
        ),
        (
            "SQL UPDATE orders SET quantity = 6000 WHERE seq = 1",
            "SQL UPDATE orders SET quantity = 2 WHERE seq = 1",
            &[
                N::PostgresSums,
                N::NoOversell,
                N::BuyerLimit,
                N::Orders,
                N::Buyers,
            ],
        ),
        (
            "SQL UPDATE orders SET status = 'cancelled', returned = quantity WHERE seq = 1",
            "SQL UPDATE orders SET status = 'confirmed', returned = 0 WHERE seq = 1",
            &[
                N::PostgresSums,
                N::Statuses,
                N::Orders,
                N::Leaderboard,
                N::Buyers,
            ],
        ),
        (
            "SQL UPDATE orders SET unit_price = 1 WHERE seq = 1",
            "SQL UPDATE orders SET unit_price = 1999 WHERE seq = 1",
            &[N::Orders],
        ),
        (
            "SQL UPDATE orders SET durability = 'committed' WHERE seq = 1",
            "SQL UPDATE orders SET durability = 'fsync' WHERE seq = 1",
            &[N::Durability, N::Orders],
        ),
        (
            "SQL DELETE FROM orders WHERE seq = 1",
            "SQL INSERT INTO orders SELECT * FROM kept",
            &[
                N::PostgresSums,
                N::DenseSeq,
                N::SaleCounts,
                N::Leaderboard,
                N::Buyers,
            ],
        ),
        (
            "SQL INSERT INTO orders SELECT (json_populate_record(o, json_build_object('id',
                 '00000001-0000-8000-8000-000000000000', 'epoch', 0))).* FROM orders o WHERE seq = 1",
            "SQL DELETE FROM orders WHERE epoch = 0",
            &[
                N::PostgresSums,
                N::DenseSeq,
                N::SaleCounts,
                N::Orders,
                N::Leaderboard,
                N::Buyers,
            ],
        ),
        (
            "SQL UPDATE round_events SET units = units + 1 WHERE kind = 'restock'",
            "SQL UPDATE round_events SET units = units - 1 WHERE kind = 'restock'",
            &[N::PostgresSums],
        ),
        (
            "SQL INSERT INTO dead_letters (partition, epoch, pseq, sale, round, seq_from, seq_to,
                 units, reason, payload) VALUES (0, 1, 1, 1, 1, 1, 0, 0, '', '')",
            "SQL DELETE FROM dead_letters",
            &[N::DeadLetters],
        ),
        (
            "ZADD ROUND:board XX INCR 1 FIRST",
            "ZADD ROUND:board XX INCR -1 FIRST",
            &[N::Leaderboard],
        ),
        (
            "HSET ROUND:buyers FIRST-BUYER stranger",
            "HSET ROUND:buyers FIRST-BUYER WHOLE",
            &[N::Buyers],
        ),
        (
            "HINCRBY {p0}:sale:1 n_ops 1",
            "HINCRBY {p0}:sale:1 n_ops -1",
            &[N::RedisKeys, N::SaleCounts],
        ),
        (
            "SQL UPDATE round_events SET operation_id = NULL WHERE kind = 'restock'",
            "SQL UPDATE round_events SET operation_id = gen_random_uuid() WHERE kind = 'restock'",
            &[N::SaleCounts],
        ),
        (
            "SQL UPDATE orders SET last_seq = 1000 WHERE status = 'cancelled'",
            "SQL UPDATE orders SET last_seq = event.seq FROM round_events AS event
                 WHERE event.order_id = orders.id",
            &[N::Statuses],
        ),
        (
            "SQL UPDATE orders SET buyer_id = gen_random_uuid() WHERE seq = 1",
            "SQL UPDATE orders SET buyer_id = kept.buyer_id FROM kept WHERE orders.id = kept.id",
            &[N::Orders, N::Buyers],
        ),
        (
            "SQL INSERT INTO certificates VALUES (1, 1, now(), now(), '', '',
                 '{\"orders_sha256\": \"00\"}', '')",
            "SQL DELETE FROM certificates",
            &[N::Certificate],
        ),
        (
            "SQL UPDATE journal_positions SET epoch = 0, installed_epoch = 0, position_epoch = 0",
            "SQL UPDATE journal_positions SET epoch = 1, installed_epoch = 1, position_epoch = 1",
            &[N::PostgresPosition, N::Epoch],
        ),
        (
            "CONFIG SET maxmemory-policy allkeys-lru",
            "CONFIG SET maxmemory-policy noeviction",
            &[N::Settings],
        ),
        (
            "XDEL {p0}:journal 1-4",
            // It is stored, and does not come back.
            "XTRIM {p0}:journal MINID 1-5",
            &[N::Journal],
        ),
    ] {
        let before = stall.audit().await;
        assert_eq!(before.verdict, Status::Pass, "before {damage}: {before:#?}");
        stall.tamper(damage).await;
        let report = stall.audit().await;
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        assert_eq!(names(&report, Status::Fail), expected, "{damage}: {report:#?}");
        assert_eq!(report.verdict, Status::Fail);
        stall.tamper(mend).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_never_cries_wolf_while_a_round_sells() {
    let stall = Arc::new(Stall::provisioned().await);
    let (writer, stop) = stall.writer().await;
    let writer = tokio::spawn(writer.run(stop.clone(), CancellationToken::new()));
    let crowd = {
        let stall = Arc::clone(&stall);
        tokio::spawn(async move {
            for day in 0..20 {
                stall.busy_day(day * 10..day * 10 + 10).await;
            }
        })
    };
    let mut audits = 0;
    while !crowd.is_finished() {
        let report = stall.audit().await;
        assert_eq!(names(&report, Status::Fail), [], "{report:#?}");
        audits += 1;
    }
    crowd.await.unwrap();
    assert!(audits > 0);
    let calm = async {
        while stall.audit().await.verdict == Status::Pending {}
        stall.audit().await
    };
    let report = timeout(PATIENCE, calm).await.unwrap();
    assert_eq!(report.verdict, Status::Pass, "{report:#?}");
    stop.cancel();
    writer.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_store_there_is_no_verdict() {
    let mut stall = Stall::provisioned().await;
    stall.redis("HSET {p0}:meta epoch 7");
    let error = stall.auditor.round(&stall.facts, 1).await.unwrap_err();
    assert!(
        matches!(error, AuditError::Engine(EngineError::Fenced(_))),
        "{error}"
    );

    let other = Stall::provisioned().await;
    other.redis.server.kill().await;
    let error = other.auditor.round(&other.facts, 1).await.unwrap_err();
    assert!(matches!(error, AuditError::Engine(_)), "{error}");
    let output = other.command(&["--wait", "0s"]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");

    stall.sql("DROP TABLE round_events").await;
    let error = stall.auditor.round(&stall.facts, 1).await.unwrap_err();
    assert!(matches!(error, AuditError::Store(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_patrol_shows_what_fails_and_that_it_heals() {
    let mut stall = Stall::provisioned().await;
    stall.busy_day(1..3).await;
    stall.drain().await;
    let metrics = AuditMetrics::default();
    let patrol = Patrol::new(stall.auditor.clone(), metrics.clone());
    let stop = CancellationToken::new();
    let task = tokio::spawn(patrol.run(stop.clone()));
    let failing = |name: CheckName| {
        let labels = CheckLabels {
            check: name.as_str(),
        };
        metrics.failing.get_or_create(&labels).get()
    };
    let until = async |name: CheckName, rounds: i64| {
        let shown = async {
            while failing(name) != rounds {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let in_time = timeout(PATIENCE, shown).await;
        in_time.unwrap_or_else(|_| panic!("{name:?} is not {rounds}"));
    };
    // At a glance.
    stall.redis("HINCRBY ROUND sold 1");
    until(CheckName::Conservation, 1).await;
    stall.redis("HINCRBY ROUND sold -1");
    until(CheckName::Conservation, 0).await;
    // In full: the damage is there before the patrol looks at the round for the first time.
    stop.cancel();
    timeout(PATIENCE, task).await.unwrap().unwrap();
    stall
        .sql("UPDATE orders SET unit_price = 1 WHERE seq = 1")
        .await;
    let patrol = Patrol::new(stall.auditor.clone(), metrics.clone());
    let stop = CancellationToken::new();
    let task = tokio::spawn(patrol.run(stop.clone()));
    until(CheckName::Orders, 1).await;
    assert_eq!(failing(CheckName::PostgresSums), 0);
    stall
        .sql("UPDATE orders SET unit_price = 1999 WHERE seq = 1")
        .await;
    until(CheckName::Orders, 0).await;
    stop.cancel();
    timeout(PATIENCE, task).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_a_store_did_not_answer_is_taken_again_soon() {
    let mut stall = Stall::provisioned().await;
    stall.busy_day(1..3).await;
    stall.drain().await;
    stall
        .sql("UPDATE orders SET unit_price = 1 WHERE seq = 1")
        .await;
    // A glance does not need this table, a full look does.
    stall.sql("ALTER TABLE certificates RENAME TO away").await;
    let metrics = AuditMetrics::default();
    let patrol = Patrol::new(stall.auditor.clone(), metrics.clone());
    let stop = CancellationToken::new();
    let task = tokio::spawn(patrol.run(stop.clone()));
    let missed = async {
        while metrics.errors.get() == 0 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, missed).await.unwrap();
    stall.sql("ALTER TABLE away RENAME TO certificates").await;
    let labels = CheckLabels {
        check: CheckName::Orders.as_str(),
    };
    let told = async {
        while metrics.failing.get_or_create(&labels).get() != 1 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, told).await.unwrap();
    stop.cancel();
    timeout(PATIENCE, task).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_lost_what_is_not_stored_is_told_with_its_entries() {
    let stall = Stall::provisioned().await;
    stall.busy_day(1..2).await;
    stall.drain().await;
    let stored = stall.engines.of(PARTITION).unwrap().inspect().await;
    let stored = stored.unwrap().pseq;
    for key in 0..3 {
        stall.buy(9, key, 1).await;
    }
    assert_eq!(names(&stall.audit().await, Status::Fail), []);
    let metrics = AuditMetrics::default();
    let patrol = Patrol::new(stall.auditor.clone(), metrics.clone());
    let stop = CancellationToken::new();
    let task = tokio::spawn(patrol.run(stop.clone()));
    stall.redis(&format!("XTRIM {{p0}}:journal MINID 1-{}", stored + 3));
    let labels = CheckLabels {
        check: CheckName::Journal.as_str(),
    };
    let told = async {
        while metrics.failing.get_or_create(&labels).get() != 1 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, told).await.unwrap();
    let report = stall.audit().await;
    assert_eq!(names(&report, Status::Fail), [CheckName::Journal]);
    let check = report.checks.iter().find(|c| c.name == CheckName::Journal);
    let missing = format!("entries {} to {} are missing", stored + 1, stored + 2);
    assert_eq!(check.unwrap().actual, missing);
    stop.cancel();
    timeout(PATIENCE, task).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_lacks_what_is_stored_is_stopped_on_every_node() {
    let stall = Stall::provisioned().await;
    stall.busy_day(1..4).await;
    stall.drain().await;
    let options = EngineOptions {
        url: stall.redis.url(),
        queue_capacity: 16,
        receipt_key: 0,
        said: Said::default(),
    };
    let other = Engine::connect(&options, PARTITION, EngineMetrics::default());
    let other = other.await.unwrap();
    let inspection = other.inspect().await.unwrap();
    other.adopt(Epoch(1), &inspection);
    // The counts are right, so no script can see it: the key of this order would buy again.
    stall.redis("HDEL {p0}:sale:1:orders FIRST");
    stall.redis("HSET {p0}:sale:1:orders 0123456789abcdef x");
    assert_eq!(
        names(&stall.audit().await, Status::Fail),
        [CheckName::Orders]
    );
    stall.buy(9, 0, 1).await;
    stall.drain().await;

    let patrol = Patrol::new(stall.auditor.clone(), AuditMetrics::default());
    let stop = CancellationToken::new();
    let task = tokio::spawn(patrol.run(stop.clone()));
    let stopped = async {
        while other.snapshot(stall.round()).await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, stopped).await.unwrap();
    for engine in [stall.engines.of(PARTITION).unwrap(), &other] {
        let refused = engine.purchase(stall.purchase(1, 0, 2)).await;
        assert!(
            matches!(refused, Err(EngineError::Damaged(_))),
            "{refused:?}"
        );
    }
    stop.cancel();
    timeout(PATIENCE, task).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_lacks_an_order_is_made_anew_by_itself() {
    let mut app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 5, "per_buyer_limit": 5 }))
        .await;
    let sale = id(&sale).to_owned();
    let buyer = clock::new_id();
    let first = app.buy(&sale, buyer, "key", 2).await.expect(201);
    assert_eq!(app.audit(&sale).await["verdict"], "pass");
    app.stop().await;
    let url = app.redis.server.url().expose_secret().to_owned();
    let order: Uuid = id(&first.json()).parse().unwrap();
    let order = quoted(order.as_bytes());
    // The counts are right: no script can see it.
    let swapped = [
        redis(&url, &format!("HDEL {{p0}}:sale:1:orders {order}")),
        redis(&url, "HSET {p0}:sale:1:orders 0123456789abcdef x"),
    ];
    assert_eq!(swapped, [":1", ":1"]);

    app.run().await;
    let made_anew = async {
        while redis(&url, &format!("HEXISTS {{p0}}:sale:1:orders {order}")) != ":1" {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, made_anew).await.unwrap();
    app.until(&format!("/v1/sales/{sale}"), |answer| answer.status == 200)
        .await;
    assert_eq!(redis(&url, "HEXISTS {p0}:round:1.1 condemned"), ":0");
    assert_eq!(redis(&url, "HLEN {p0}:sale:1:orders"), ":1");
    let again = app.buy(&sale, buyer, "key", 2).await.expect(201);
    assert_eq!(again.text, first.text);
    assert_eq!(app.view(&sale).await["remaining"], 3);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_tells_by_its_exit_code_and_changes_nothing() {
    let mut stall = Stall::provisioned().await;
    stall.busy_day(1..3).await;
    let output = stall.command(&["--wait", "0s"]).await;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    stall.drain().await;

    let sale = stall.facts.id.to_string();
    let output = stall.command(&["--sale", &sale, "--json"]).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(findings["verdict"], "pass");
    let round = &findings["rounds"][0];
    assert_eq!(round["sale_id"], sale.as_str());
    assert_eq!(round["round"], 1);
    let checks = round["checks"].as_array().unwrap();
    assert_eq!(checks.len(), CheckName::ALL.len());
    for check in checks {
        assert!(
            CheckName::ALL
                .iter()
                .any(|name| check["name"] == name.as_str())
        );
        assert_eq!(check["status"], "pass");
        assert!(check["expected"].is_string() && check["actual"].is_string());
    }
    let at = round["checked_at"].as_str().unwrap();
    assert!(at.len() == 24 && at.ends_with('Z'), "{at}");

    stall.redis("HINCRBY ROUND sold 1");
    let output = stall.command(&[]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("fail     conservation"), "{table}");
    stall.redis("HINCRBY ROUND sold -1");

    let nobody = Uuid::nil().to_string();
    let output = stall.command(&["--sale", &nobody]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    // Everything was only read: the engine of before still goes on.
    let inspection = stall.engines.of(PARTITION).unwrap().inspect().await;
    assert_eq!(inspection.unwrap().epoch, Some(Epoch(1)));
    assert_eq!(stall.audit().await.verdict, Status::Pass);

    stall.sql("UPDATE journal_positions SET epoch = 2").await;
    let output = stall.command(&["--wait", "0s"]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.starts_with("partition p0 is fenced") && said.contains("PostgreSQL in epoch 2"),
        "{said}"
    );
}
