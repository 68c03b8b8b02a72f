//! What PostgreSQL and the journal do to the writer, beyond `writer.rs`: entries that cannot be
//! stored, a disk that is full, a table that is locked, a PostgreSQL that is slow, and two timelines
//! at once. What is sold goes on being sold, and everything is stored afterwards.

use futures::future::join_all;
use stockade::{
    domain::{id::Epoch, order::Decision},
    store::{journal::Positions, orders::Orders},
    writer::{Halt, State, WriterStatus},
};
use tokio::time::timeout;

use super::{
    support::wire::Wire,
    writer::{PARTITION, PATIENCE, Shop, end_of},
};

const JOURNAL: &str = "{p0}:journal";

/// Orders that a crowd buys while something is wrong.
async fn crowd(shop: &Shop, first: u128) {
    join_all((first..first + 40).map(|buyer| shop.buy(buyer, 0, 1))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_of_a_newer_version_waits_for_one_who_can_read_it() {
    let shop = Shop::open().await;
    crowd(&shop, 1).await;
    shop.drain().await;
    let before = shop.end().await;
    let newer = shop.buy(100, 0, 1).await;
    let forged = shop.end().await.to_string();
    crowd(&shop, 200).await;
    let mut wire = Wire::connect(&shop.redis).await;
    wire.forge(JOURNAL, &forged, "f.v = '9'").await;
    let mut writer = shop.write().await;
    let halt = writer.halt().await;
    assert!(
        matches!(halt, Halt::UnknownVersion { version: 9, .. }),
        "{halt:?}"
    );
    assert!(!halt.passing());
    assert_eq!(writer.stored.get(), before);
    assert!(writer.status.borrow().lag_entries > 1);
    let orders = Orders::new(shop.database.clone());
    assert_eq!(orders.by_id(newer).await.unwrap(), None);
    // A build that can read it.
    wire.forge(JOURNAL, &forged, "f.v = '2'").await;
    writer.reach(shop.end().await).await;
    writer.stop().await;
    assert!(orders.by_id(newer).await.unwrap().is_some());
    assert_eq!(shop.audit().await.dead_letters, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_entry_blocks_nobody_and_its_order_can_still_be_read() {
    let shop = Shop::open().await;
    crowd(&shop, 1).await;
    shop.drain().await;
    let poisoned = shop.buy(100, 0, 3).await;
    let forged = shop.end().await.to_string();
    crowd(&shop, 200).await;
    let mut wire = Wire::connect(&shop.redis).await;
    wire.forge(JOURNAL, &forged, "f.o = string.rep('\\255', 10)")
        .await;
    let mut writer = shop.write().await;
    writer.reach(shop.end().await).await;
    let drained = |status: &WriterStatus| status.state == State::Waiting && status.lag_entries == 0;
    timeout(PATIENCE, writer.status.wait_for(drained))
        .await
        .unwrap()
        .unwrap();
    writer.stop().await;
    let sums = shop.audit().await;
    assert_eq!((sums.dead_letters, sums.dead.sold), (1, 3));
    // Redis has it as long as PostgreSQL does not.
    let order = shop.engine.order(poisoned).await.unwrap().unwrap();
    assert_eq!(order.quantity, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_were_trimmed_too_early_are_named_and_nothing_after_them_is_stored() {
    let shop = Shop::open().await;
    crowd(&shop, 1).await;
    shop.drain().await;
    let stored = shop.end().await;
    let gone = shop.buy(100, 0, 1).await;
    let later = shop.buy(101, 0, 1).await;
    let end = shop.end().await;
    let mut wire = Wire::connect(&shop.redis).await;
    let oldest = end.to_string();
    let trimmed = wire.run(&["XTRIM", JOURNAL, "MINID", &oldest]).await;
    assert_ne!(trimmed, "0");
    let mut writer = shop.write().await;
    let halt = writer.halt().await;
    let named = Halt::Missing {
        position: stored,
        oldest: end.pseq,
    };
    assert_eq!(halt, named);
    assert!(!halt.passing());
    writer.stop().await;
    let orders = Orders::new(shop.database.clone());
    for order in [gone, later] {
        assert_eq!(orders.by_id(order).await.unwrap(), None);
        assert!(shop.engine.order(order).await.unwrap().is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_waited_for() {
    let mut shop = Shop::open().await;
    shop.sql(
        "CREATE FUNCTION disk_full() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$;
         CREATE TRIGGER disk_full BEFORE INSERT ON orders EXECUTE FUNCTION disk_full()",
    )
    .await;
    let mut writer = shop.write().await;
    crowd(&shop, 1).await;
    let halt = writer.halt().await;
    assert!(matches!(halt, Halt::Store(_)) && halt.passing(), "{halt:?}");
    crowd(&shop, 200).await;
    shop.sql("DROP TRIGGER disk_full ON orders").await;
    writer.reach(shop.end().await).await;
    writer.stop().await;
    assert_eq!(shop.audit().await.dead_letters, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_outlasts_the_writers_patience_loses_nothing() {
    let mut shop = Shop::open().await;
    shop.sql("BEGIN; LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
        .await;
    let mut writer = shop.write().await;
    crowd(&shop, 1).await;
    // Its lock timeout ends the wait.
    let halt = writer.halt().await;
    assert!(matches!(halt, Halt::Store(_)) && halt.passing(), "{halt:?}");
    crowd(&shop, 200).await;
    shop.sql("COMMIT").await;
    writer.reach(shop.end().await).await;
    writer.stop().await;
    assert_eq!(shop.audit().await.dead_letters, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_postgresql_shows_its_lag_and_catches_up() {
    let mut shop = Shop::open().await;
    shop.sql(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN PERFORM pg_sleep(0.2); RETURN NULL; END $$;
         CREATE TRIGGER slow BEFORE INSERT ON orders EXECUTE FUNCTION slow()",
    )
    .await;
    let mut writer = shop.write().await;
    for turn in 0..10 {
        crowd(&shop, 1 + 100 * turn).await;
    }
    let behind = |status: &WriterStatus| status.lag_entries > 0 && status.oldest_at_ms.is_some();
    timeout(PATIENCE, writer.status.wait_for(behind))
        .await
        .unwrap()
        .unwrap();
    shop.sql("DROP TRIGGER slow ON orders").await;
    writer.reach(shop.end().await).await;
    let drained = |status: &WriterStatus| status.state == State::Waiting && status.lag_entries == 0;
    timeout(PATIENCE, writer.status.wait_for(drained))
        .await
        .unwrap()
        .unwrap();
    writer.stop().await;
    shop.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_timelines_only_the_new_one_is_stored() {
    let shop = Shop::open().await;
    crowd(&shop, 1).await;
    let mut zombie = shop.write().await;
    zombie.reach(shop.end().await).await;
    // The new primary is a copy of the old one, which goes on selling.
    let copy = shop.redis.copy().await;
    let promoted = super::support::connect(&copy, PARTITION).await;
    let positions = Positions::new(shop.database.clone());
    let raised = positions
        .raise_epoch(PARTITION, Epoch(1), Epoch(1), 0, None)
        .await
        .unwrap();
    assert_eq!(raised.unwrap().epoch, Epoch(2));
    let lost = shop.buy(900, 0, 1).await;
    let inspection = promoted.inspect().await.unwrap();
    let begun = promoted.install(Epoch(2), &inspection).await.unwrap();
    promoted.open(begun, &inspection);
    let mut writer = shop.write_from(&promoted).await;
    writer.reach(begun).await;
    let kept = promoted.purchase(shop.item(901, 0, 1)).await.unwrap();
    let more = shop.buy(902, 0, 1).await;
    assert!(matches!(zombie.halt().await, Halt::Fenced(_)));
    writer.reach(end_of(&promoted).await).await;
    let orders = Orders::new(shop.database.clone());
    let Decision::Accepted(kept) = kept.decision else {
        panic!("{kept:?}")
    };
    assert!(orders.by_id(kept.id).await.unwrap().is_some());
    for order in [lost, more] {
        assert_eq!(orders.by_id(order).await.unwrap(), None);
    }
    writer.stop().await;
    zombie.stop().await;
}
