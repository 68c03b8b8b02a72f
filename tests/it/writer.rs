//! The writer between a real Redis and a real PostgreSQL, and everything that may go wrong there.

use std::time::Duration;

use super::support::{Redis, cancel, restock};
use secrecy::ExposeSecret;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stockade::{
    clock,
    domain::{
        hurdles::Hurdles,
        id::{
            BuyerId, Epoch, Fingerprint, JournalId, OperationId, OrderId, Partition, ProductId,
            RoundId, SaleId, SaleNumber,
        },
        model::Provisioned,
        money::{Currency, Money},
        order::{Decision, Durability, Mode, Purchase, Status},
        round::{Intent, Policy, Terms, Window},
    },
    embedded::{PostgresOptions, PostgresServer},
    engine::Engine,
    store::{
        Database, DatabaseSettings,
        audit::{RoundSums, Snapshot},
        journal::{Ledger, Positions},
        orders::Orders,
        sales::{Inserted, NewSale, Sales},
    },
    writer::{self, Halt, Redriven, State, StoredPosition, Writer, WriterStatus},
};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) const PARTITION: Partition = Partition(0);
const ACTOR: Uuid = Uuid::from_u128(0xac);
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A sale on its own stores, with nobody draining its journal.
pub(crate) struct Shop {
    pub(crate) engine: Engine,
    pub(crate) round: RoundId,
    pub(crate) database: Database,
    sql: PgConnection,
    postgres: PostgresServer,
    pub(crate) redis: Redis,
    _dir: TempDir,
}

impl Shop {
    pub(crate) async fn open() -> Self {
        let dir = TempDir::new().unwrap();
        let options = PostgresOptions {
            throwaway: true,
            ..PostgresOptions::new(dir.path().join("postgres"))
        };
        let (redis, postgres) = tokio::join!(Redis::start(), PostgresServer::start(options));
        let postgres = postgres.unwrap();
        let url = postgres.url().expose_secret();
        let database = Database::new(url, DatabaseSettings::default()).unwrap();
        database.migrate().await.unwrap();
        let mut sql = PgConnection::connect(url).await.unwrap();

        let positions = Positions::new(database.clone());
        assert_eq!(
            positions
                .raise_epoch(PARTITION, Epoch::default(), Epoch::default(), 0, None)
                .await
                .unwrap()
                .unwrap()
                .epoch,
            Epoch(1)
        );
        let engine = super::support::engine(&redis, PARTITION).await;
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
                per_buyer_limit: 100,
                per_order_limit: 10,
                unit_price: Money::new(1999, Currency::parse("EUR").unwrap()).unwrap(),
                allocation: 10_000,
                policy: Policy::default(),
            },
            schedule: None,
            created_by: ACTOR,
        };
        let inserted = Sales::new(database.clone()).insert(sale).await.unwrap();
        let Inserted::New(sale) = inserted else {
            panic!("{inserted:?}")
        };
        let round = sale.facts.round_id();
        let provisioned = engine.provision(round, &sale.facts.terms).await.unwrap();
        assert_eq!(provisioned, Provisioned::Created);
        Self {
            engine,
            round,
            database,
            sql,
            postgres,
            redis,
            _dir: dir,
        }
    }

    pub(crate) fn item(&self, buyer: u128, key: u32, quantity: u64) -> Purchase {
        let buyer = BuyerId(Uuid::from_u128(buyer));
        Purchase {
            round: self.round,
            order: OrderId::derive(self.round.sale, buyer, &key.to_string()),
            buyer,
            quantity,
            fingerprint: Fingerprint::of(&[&quantity.to_be_bytes()]),
            durability: Durability::Fsync,
            redeem: false,
            archive: 0,
        }
    }

    pub(crate) async fn buy(&self, buyer: u128, key: u32, quantity: u64) -> OrderId {
        let answer = self
            .engine
            .purchase(self.item(buyer, key, quantity))
            .await
            .unwrap();
        let Decision::Accepted(order) = answer.decision else {
            panic!("{answer:?}")
        };
        order.id
    }

    /// Ten buyers buy and give back, and the operator does what operators do.
    pub(crate) async fn busy_day(&self, first_buyer: u128) {
        for buyer in first_buyer..first_buyer + 10 {
            let orders = futures::future::join_all(
                (0..8).map(|key| self.buy(buyer, key, u64::from(key % 3) + 1)),
            )
            .await;
            let cancelled = cancel(&self.engine, self.round, orders[3], ACTOR);
            cancelled.await.unwrap();
        }
        let operation = OperationId::derive("restock", ACTOR, &first_buyer.to_string());
        let fingerprint = Fingerprint::of(&[b"25"]);
        let restocked = restock(&self.engine, self.round, 25, operation, fingerprint, ACTOR);
        restocked.await.unwrap();
        self.engine
            .control(self.round, Intent::Paused, ACTOR)
            .await
            .unwrap();
        self.engine
            .control(self.round, Intent::Live, ACTOR)
            .await
            .unwrap();
    }

    pub(crate) async fn sql(&mut self, statement: &str) {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned()))
            .execute(&mut self.sql)
            .await
            .unwrap();
    }

    pub(crate) async fn end(&self) -> JournalId {
        end_of(&self.engine).await
    }

    pub(crate) async fn write(&self) -> Running {
        self.write_from(&self.engine).await
    }

    /// A writer of another Redis into the same PostgreSQL.
    pub(crate) async fn write_from(&self, engine: &Engine) -> Running {
        let ledger = Ledger::new(&self.database, PARTITION);
        let writer = Writer::new(ledger, engine.journal_reader().await.unwrap());
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        Running {
            status: writer.status(),
            stored: writer.stored(),
            task: tokio::spawn(writer.run(stop.clone(), abort.clone())),
            stop,
            abort,
        }
    }

    /// A writer drains everything and stops.
    pub(crate) async fn drain(&self) {
        let mut writer = self.write().await;
        writer.reach(self.end().await).await;
        writer.stop().await;
    }

    /// Both stores agree, and every invariant holds.
    pub(crate) async fn audit(&self) -> RoundSums {
        let mut snapshot = Snapshot::take(&self.database).await.unwrap();
        let sums = snapshot.round(self.round).await.unwrap().unwrap();
        let keys = self.engine.audit(self.round).await.unwrap().keys.unwrap();
        assert_eq!(sums.counters, keys.standing.counters);
        assert_eq!(sums.counted(), sums.counters);
        assert_eq!(sums.intent, keys.standing.intent);
        assert_eq!((sums.gap, sums.duplicates, sums.buyers_above), (None, 0, 0));
        assert_eq!(sums.events, sums.last_seq);
        assert_eq!(sums.position, self.end().await);
        sums
    }
}

/// The last entry of a journal.
pub(crate) async fn end_of(engine: &Engine) -> JournalId {
    let inspection = engine.inspect().await.unwrap();
    JournalId {
        epoch: inspection.epoch.unwrap(),
        pseq: inspection.pseq,
    }
}

pub(crate) struct Running {
    pub(crate) status: watch::Receiver<WriterStatus>,
    pub(crate) stored: StoredPosition,
    task: JoinHandle<()>,
    stop: CancellationToken,
    abort: CancellationToken,
}

impl Running {
    pub(crate) async fn reach(&mut self, id: JournalId) {
        assert!(timeout(PATIENCE, self.stored.reached(id)).await.unwrap());
    }

    pub(crate) async fn halt(&mut self) -> Halt {
        let halted = self
            .status
            .wait_for(|status| matches!(status.state, State::Halted(_)));
        match &timeout(PATIENCE, halted).await.unwrap().unwrap().state {
            State::Halted(halt) => halt.clone(),
            state => panic!("{state:?}"),
        }
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_set_back_or_deleted_doubles_nothing() {
    let mut shop = Shop::open().await;
    shop.busy_day(1).await;
    shop.drain().await;
    shop.audit().await;
    let damages = [
        "UPDATE journal_positions SET position = 0, position_epoch = 0",
        "UPDATE journal_positions SET position = 5, position_epoch = 1",
        // A number by hand, and the epoch left as it was.
        "UPDATE journal_positions SET position = 0",
        "UPDATE journal_positions SET position = 0, position_epoch = 0;
         DELETE FROM orders WHERE seq IN (2, 30);
         DELETE FROM round_events WHERE seq BETWEEN 20 AND 40;
         UPDATE orders SET status = accepted_as, last_seq = seq, returned = 0 WHERE seq > 50",
        "DELETE FROM journal_positions",
    ];
    for (key, damage) in (0..).zip(damages) {
        shop.sql(damage).await;
        // The order tells when the writer is through: it is behind everything that is known.
        shop.buy(900, key, 1).await;
        shop.drain().await;
        shop.audit().await;
    }
    // The same with more than one epoch behind it.
    let positions = Positions::new(shop.database.clone());
    for epoch in [2, 3] {
        let present = Epoch(epoch - 1);
        let raised = positions
            .raise_epoch(PARTITION, present, present, 0, None)
            .await
            .unwrap();
        assert_eq!(raised.unwrap().epoch, Epoch(epoch));
        let inspection = shop.engine.inspect().await.unwrap();
        let begun = shop.engine.install(Epoch(epoch), &inspection).await;
        shop.engine.open(begun.unwrap(), &inspection);
        shop.buy(901, epoch, 1).await;
        shop.drain().await;
    }
    for position in [0, 1, 7] {
        shop.sql(&format!(
            "UPDATE journal_positions SET position = {position}"
        ))
        .await;
        shop.buy(902, position, 1).await;
        shop.drain().await;
        shop.audit().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_content_under_an_id_or_a_place_stops_the_partition() {
    let mut shop = Shop::open().await;
    shop.busy_day(1).await;
    shop.drain().await;
    for damage in [
        "UPDATE orders SET quantity = quantity + 1 WHERE seq = 5",
        "UPDATE orders SET quantity = quantity - 1, id = gen_random_uuid() WHERE seq = 5",
    ] {
        shop.sql(damage).await;
        shop.sql("UPDATE journal_positions SET position = 0, position_epoch = 0")
            .await;
        let mut writer = shop.write().await;
        assert!(matches!(writer.halt().await, Halt::Conflict(_)));
        assert_eq!(writer.stored.get(), JournalId::default());
        writer.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_order_becomes_a_dead_letter_with_all_that_follows_it() {
    let mut shop = Shop::open().await;
    shop.sql("ALTER TABLE orders ADD CONSTRAINT poison CHECK (quantity <> 7)")
        .await;
    let early = shop.buy(50, 1, 7).await;
    let both = shop.buy(50, 2, 7).await;
    cancel(&shop.engine, shop.round, both, ACTOR).await.unwrap();
    shop.busy_day(1).await;
    shop.drain().await;
    cancel(&shop.engine, shop.round, early, ACTOR)
        .await
        .unwrap();
    shop.buy(50, 3, 7).await;
    shop.drain().await;
    let sums = shop.audit().await;
    assert_eq!((sums.dead_letters, sums.dead.sold), (5, 7));
    // Read once more, they are recognised.
    shop.sql("UPDATE journal_positions SET position = 0, position_epoch = 0")
        .await;
    shop.drain().await;
    assert_eq!(shop.audit().await.dead_letters, 5);
    // A hundred in a row are no accident.
    shop.sql("ALTER TABLE orders ADD CONSTRAINT plague CHECK (quantity <> 9)")
        .await;
    futures::future::join_all((0..100).map(|buyer| shop.buy(100 + buyer, 0, 9))).await;
    let mut writer = shop.write().await;
    assert!(matches!(writer.halt().await, Halt::TooManyDead { .. }));
    shop.sql("ALTER TABLE orders DROP CONSTRAINT plague").await;
    writer.reach(shop.end().await).await;
    writer.stop().await;
    assert_eq!(shop.audit().await.dead_letters, 5);
}

/// Everything that is a dead letter, once more. Gives how many were stored, and how many stay.
async fn redrive(shop: &Shop) -> (usize, usize) {
    let mut snapshot = Snapshot::take(&shop.database).await.unwrap();
    let letters = snapshot.letters(PARTITION).await.unwrap();
    let mut ledger = Ledger::new(&shop.database, PARTITION);
    let outcomes = writer::redrive(&mut ledger, &letters).await.unwrap();
    let stored = |(_, outcome): &&(i64, Redriven)| *outcome == Redriven::Stored;
    let stored = outcomes.iter().filter(stored).count();
    (stored, outcomes.len() - stored)
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_stored_in_order_once_their_cause_is_mended() {
    let mut shop = Shop::open().await;
    shop.sql("ALTER TABLE orders ADD CONSTRAINT seven CHECK (quantity <> 7)")
        .await;
    shop.sql("ALTER TABLE orders ADD CONSTRAINT nine CHECK (quantity <> 9)")
        .await;
    shop.sql("ALTER TABLE round_events ADD CONSTRAINT five CHECK (kind <> 'restock')")
        .await;
    let returned = shop.buy(50, 1, 7).await;
    shop.buy(50, 2, 9).await;
    let cancelled = cancel(&shop.engine, shop.round, returned, ACTOR);
    cancelled.await.unwrap();
    shop.buy(50, 3, 1).await;
    let operation = OperationId::derive("restock", ACTOR, "more");
    let asked = Fingerprint::units("restock", 5);
    let restocked = restock(&shop.engine, shop.round, 5, operation, asked, ACTOR);
    restocked.await.unwrap();
    shop.drain().await;
    assert_eq!(shop.audit().await.dead_letters, 4);
    // As long as nothing is mended, nothing changes.
    assert_eq!(redrive(&shop).await, (0, 4));
    shop.sql("ALTER TABLE orders DROP CONSTRAINT seven").await;
    assert_eq!(redrive(&shop).await, (2, 2));
    let sums = shop.audit().await;
    assert_eq!((sums.dead_letters, sums.dead.sold), (2, 9));
    shop.sql("ALTER TABLE orders DROP CONSTRAINT nine").await;
    shop.sql("ALTER TABLE round_events DROP CONSTRAINT five")
        .await;
    let (one, other) = tokio::join!(redrive(&shop), redrive(&shop));
    assert_eq!((one.1, other.1), (0, 0));
    assert_eq!(redrive(&shop).await, (0, 0));
    let sums = shop.audit().await;
    assert_eq!(
        (sums.dead_letters, sums.dead.sold, sums.restocked),
        (0, 0, 5)
    );
    let order = Orders::new(shop.database.clone()).by_id(returned).await;
    assert_eq!(order.unwrap().unwrap().status, Status::Cancelled);
    // The journal, read once more, agrees.
    shop.sql("UPDATE journal_positions SET position = 0, position_epoch = 0")
        .await;
    shop.drain().await;
    assert_eq!(shop.audit().await.dead_letters, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_postgresql_has_lost_keeps_nobody_waiting() {
    let mut shop = Shop::open().await;
    let lost = RoundId {
        sale: SaleNumber(shop.round.sale.0 + 1),
        round: 1,
    };
    let terms = Terms {
        window: Window {
            opens_at_ms: 1,
            closes_at_ms: None,
        },
        per_buyer_limit: 100,
        per_order_limit: 10,
        unit_price: Money::new(1999, Currency::parse("EUR").unwrap()).unwrap(),
        allocation: 50,
        policy: Policy::default(),
    };
    shop.engine.provision(lost, &terms).await.unwrap();
    let elsewhere = |buyer: u128, quantity: u64| {
        let buyer = BuyerId(Uuid::from_u128(buyer));
        Purchase {
            round: lost,
            order: OrderId::derive(lost.sale, buyer, "k"),
            buyer,
            quantity,
            ..shop.item(1, 1, quantity)
        }
    };
    // In one call with others: one entry.
    let (other, own) = tokio::join!(shop.engine.purchase(elsewhere(1, 3)), shop.buy(900, 0, 1));
    assert!(matches!(other.unwrap().decision, Decision::Accepted(_)));
    let gone = elsewhere(2, 4);
    shop.engine.purchase(gone).await.unwrap();
    cancel(&shop.engine, lost, gone.order, ACTOR).await.unwrap();
    shop.busy_day(1).await;
    shop.drain().await;
    shop.audit().await;
    let orders = Orders::new(shop.database.clone());
    assert!(orders.by_id(own).await.unwrap().is_some());
    let letters = "SELECT count(*), sum(units)::bigint, sum(allocated)::bigint FROM dead_letters
                   WHERE resolved_at IS NULL";
    let found: (i64, i64, i64) = sqlx::query_as(letters)
        .fetch_one(&mut shop.sql)
        .await
        .unwrap();
    assert_eq!(found, (4, 3, 50));
    shop.sql("UPDATE journal_positions SET position = 0, position_epoch = 0")
        .await;
    shop.drain().await;
    let found: (i64, i64, i64) = sqlx::query_as(letters)
        .fetch_one(&mut shop.sql)
        .await
        .unwrap();
    assert_eq!(found, (4, 3, 50), "read once more");

    // Once somebody has put sale and round back, its letters are stored.
    shop.sql(&format!(
        "INSERT INTO sales (id, number, product_id, name, price_amount, price_currency, allocation,
                            per_buyer_limit, per_order_limit, opens_at, durability, payment,
                            created_by, request_fingerprint)
         OVERRIDING SYSTEM VALUE
         SELECT gen_random_uuid(), {0}, product_id, name, price_amount, price_currency, 50, 100, 10,
                opens_at, durability, payment, created_by, request_fingerprint FROM sales;
         INSERT INTO rounds (sale, round, unit_price, currency, initial_allocation, per_buyer_limit,
                             per_order_limit, opens_at, provisioned_at, allocation, remaining)
         SELECT {0}, 1, unit_price, currency, 50, 100, 10, opens_at, now(), 50, 50
         FROM rounds WHERE sale = {1}",
        lost.sale.0, shop.round.sale.0
    ))
    .await;
    assert_eq!(redrive(&shop).await, (4, 0));
    let mut snapshot = Snapshot::take(&shop.database).await.unwrap();
    let sums = snapshot.round(lost).await.unwrap().unwrap();
    let keys = shop.engine.audit(lost).await.unwrap().keys.unwrap();
    assert_eq!(sums.counters, keys.standing.counters);
    assert_eq!(sums.counted(), sums.counters);
    assert_eq!((sums.gap, sums.events, sums.dead_letters), (None, 3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_of_an_old_epoch_stores_nothing() {
    let shop = Shop::open().await;
    shop.busy_day(1).await;
    let mut writer = shop.write().await;
    writer.reach(shop.end().await).await;
    // Redis goes on in the old timeline, as an old primary would.
    Positions::new(shop.database.clone())
        .raise_epoch(PARTITION, Epoch(1), Epoch(1), 0, None)
        .await
        .unwrap();
    let order = shop.buy(900, 1, 1).await;
    assert!(matches!(writer.halt().await, Halt::Fenced(_)));
    let orders = Orders::new(shop.database.clone());
    assert_eq!(orders.by_id(order).await.unwrap(), None);
    // Once the new epoch has begun with all that was there, it goes on by itself.
    let inspection = shop.engine.inspect().await.unwrap();
    let begun = shop.engine.install(Epoch(2), &inspection).await.unwrap();
    shop.engine.open(begun, &inspection);
    writer.reach(begun).await;
    writer.stop().await;
    assert!(orders.by_id(order).await.unwrap().is_some());
    shop.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_writers_that_are_cut_off_at_any_moment_store_everything_once() {
    let shop = Shop::open().await;
    let mut writers = vec![];
    for day in 0..12 {
        writers.push(shop.write().await);
        shop.busy_day(day * 100).await;
        if writers.len() > 4 {
            let cut_off = writers.remove(0);
            cut_off.abort.cancel();
            cut_off.task.await.unwrap();
        }
    }
    let end = shop.end().await;
    for mut writer in writers {
        writer.reach(end).await;
        writer.stop().await;
    }
    shop.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sold_while_postgresql_is_away_is_stored_when_it_is_back() {
    let mut shop = Shop::open().await;
    let mut writer = shop.write().await;
    writer.reach(shop.end().await).await;
    shop.postgres.kill().await;
    shop.busy_day(1).await;
    assert!(matches!(writer.halt().await, Halt::Store(_)));
    let behind = |status: &WriterStatus| status.lag_entries > 0 && status.oldest_at_ms.is_some();
    timeout(PATIENCE, writer.status.wait_for(behind))
        .await
        .unwrap()
        .unwrap();
    shop.postgres.restart().await.unwrap();
    writer.reach(shop.end().await).await;
    let drained = |status: &WriterStatus| status.state == State::Waiting;
    timeout(PATIENCE, writer.status.wait_for(drained))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(writer.status.borrow().lag_entries, 0);
    assert!(writer.status.borrow().lag_seconds(clock::now_ms()).abs() < f64::EPSILON);
    writer.stop().await;
    shop.audit().await;
}
