//! Against a small shop over real sockets.

use std::collections::HashSet;

use bytes::Bytes;
use serde_json::Value;
use uuid::Uuid;

use super::*;
use crate::clock;
use crate::load::crowd::{Arrivals, Crowd};
use crate::load::outcome::judge;
use crate::load::tokens::Signer;
use crate::report::Speed;
use crate::shop::{Faults, SECRET, Shop};

const SALE: Uuid = Uuid::from_u128(7);

/// A crowd whose connections stand.
struct Ready {
    target: Target,
    crowd: Crowd,
    pool: Pool,
    tally: Arc<Tally>,
}

impl Ready {
    async fn at(shop: &Shop, buyers: usize, arrivals: Arrivals, patience: Duration) -> Self {
        let load = Load {
            target: Target::parse(&shop.url()).unwrap(),
            connections: 16,
            threads: 2,
            timeout: Duration::from_secs(20),
            patience,
            cuts_every: None,
            seed: 11,
        };
        let crowd = Crowd::once(buyers, arrivals, 11);
        let pool = Pool::open(&load).await.unwrap();
        assert_eq!(pool.opened, 16);
        let tally = Arc::default();
        Self {
            target: load.target,
            crowd,
            pool,
            tally,
        }
    }

    /// One purchase of every buyer.
    async fn go(self) -> Vec<Record> {
        let signer = Signer::new(SECRET, clock::now());
        let bearers = signer.buyers(&self.crowd.ids()).unwrap();
        let path = format!("/v1/sales/{SALE}/orders");
        let body = r#"{"quantity":1}"#;
        let requests = Requests::new(&self.target, [path], bearers, "key".to_owned(), body);
        let sending = Sending {
            requests: Arc::new(requests),
            judge,
            plan: self.crowd.plan(),
            opening: Instant::now(),
        };
        let sent = self.pool.run(Arc::new(sending), self.tally).await.unwrap();
        assert_eq!(sent.records.len(), self.crowd.buyers);
        sent.records
    }
}

/// Long enough for any machine.
const PATIENT: Duration = Duration::from_mins(1);

fn accepted(records: &[Record]) -> usize {
    let accepted = |record: &&Record| matches!(record.outcome, Outcome::Accepted { .. });
    records.iter().filter(accepted).count()
}

/// Different orders among the acceptances.
fn orders(records: &[Record]) -> usize {
    let bodies = records.iter().filter_map(|record| match &record.outcome {
        Outcome::Accepted { body, .. } => Some(body),
        _ => None,
    });
    let id = |body: &Bytes| serde_json::from_slice::<Value>(body).unwrap()["id"].to_string();
    bodies.map(id).collect::<HashSet<_>>().len()
}

#[tokio::test]
async fn a_burst_buys_the_stock_and_nothing_else() {
    let shop = Shop::start(Faults::default());
    shop.put_up(SALE, 30);
    let crowd = Ready::at(&shop, 500, Arrivals::Burst, PATIENT).await;
    let tally = Arc::clone(&crowd.tally);
    let records = crowd.go().await;
    assert_eq!(
        (accepted(&records), orders(&records), shop.orders()),
        (30, 30, 30)
    );
    let sold_out = Outcome::Refused {
        code: "sold_out".to_owned(),
    };
    let refused = records.iter().filter(|record| record.outcome == sold_out);
    assert_eq!(refused.count(), 470);
    assert_eq!(tally.ended(), 500);
    assert!(records.iter().all(|record| record.retries == 0));
    assert!(
        records
            .iter()
            .enumerate()
            .all(|(n, record)| record.purchase == n)
    );
}

#[tokio::test]
async fn a_server_that_stands_still_for_a_second_shows_in_the_latency() {
    let shop = Shop::start(Faults {
        stands_still: Some((200, Duration::from_secs(1))),
        ..Faults::default()
    });
    shop.put_up(SALE, 600);
    let crowd = Ready::at(&shop, 600, Arrivals::Rate(300.0), PATIENT).await;
    let records = crowd.go().await;
    let speed = Speed::of(&records, None).unwrap();
    // Some 300 of 600 were due while it stood still, and waited for half of that on average. If
    // the 16 connections had just waited for their answers and sent nothing meanwhile, 16
    // answers would have been slow: less than 3 %.
    assert_eq!(speed.latency_ms.all.count, 600);
    assert!(speed.latency_ms.all.p90 >= 500.0, "{speed:?}");
    assert!(speed.latency_ms.all.p99 >= 900.0, "{speed:?}");
    assert!(speed.latency_ms.send_delay.p90 >= 500.0, "{speed:?}");
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_with_the_same_key() {
    let shop = Shop::start(Faults {
        cuts_every: Some(7),
        doubts_every: Some(11),
        busy_every: Some(13),
        ..Faults::default()
    });
    shop.put_up(SALE, 150);
    let records = Ready::at(&shop, 400, Arrivals::Burst, PATIENT)
        .await
        .go()
        .await;
    assert_eq!(
        (accepted(&records), orders(&records), shop.orders()),
        (150, 150, 150)
    );
    let mut replays = records
        .iter()
        .filter(|record| matches!(record.outcome, Outcome::Accepted { replayed: true, .. }))
        .peekable();
    assert!(replays.peek().is_some());
    assert!(replays.all(|record| record.retries > 0));
}

#[tokio::test]
async fn a_server_that_is_stopped_and_started_again_loses_nobody() {
    let mut shop = Shop::start(Faults::default());
    shop.put_up(SALE, 600);
    let crowd = Ready::at(&shop, 700, Arrivals::Rate(400.0), PATIENT).await;
    let tally = Arc::clone(&crowd.tally);
    let operator = thread::spawn(move || {
        while tally.accepted.load(Ordering::Relaxed) < 100 {
            thread::yield_now();
        }
        shop.stop();
        while tally.retries.load(Ordering::Relaxed) < 50 {
            thread::yield_now();
        }
        shop.start_again();
        shop
    });
    let records = crowd.go().await;
    let shop = operator.join().unwrap();
    assert_eq!(
        (accepted(&records), orders(&records), shop.orders()),
        (600, 600, 600)
    );
}

#[tokio::test]
async fn patience_ends() {
    let mut shop = Shop::start(Faults::default());
    let patience = Duration::from_millis(300);
    let crowd = Ready::at(&shop, 50, Arrivals::Burst, patience).await;
    shop.stop();
    for record in crowd.go().await {
        // A connection that was open may have carried the request away; a new one never stood.
        assert!(
            matches!(
                record.outcome,
                Outcome::Failed { .. } | Outcome::Unknown { .. }
            ),
            "{record:?}"
        );
        assert_eq!(
            matches!(record.outcome, Outcome::Failed { .. }),
            record.first_sent.is_none(),
            "{record:?}"
        );
        assert!(record.retries > 0, "{record:?}");
    }
}
