//! Every order and every buyer of a round, on both sides, in one pass of pages: what Redis must be is
//! computed from the stored rows alone.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::{AuditError, Pair, Sides};
use crate::{
    domain::{
        id::{OrderId, RoundId},
        order::{Order, Status},
        round::LimitScope,
    },
    engine::{Engine, EngineError, Kept},
    store::{
        audit::{RoundSums, Snapshot},
        orders::Place,
    },
};

/// Orders of a page: half a millisecond of Redis.
const PAGE: i64 = 500;

/// The hash over all orders of a round, in order of (epoch, seq): SHA-256 of one line of text for
/// each, as `docs/CERTIFICATES.md` says it.
#[derive(Clone, Debug, Default)]
pub struct OrdersHash(Sha256);

impl OrdersHash {
    /// One more order.
    pub fn add(&mut self, order: &Order) {
        self.0.update(line(order));
    }

    /// The hash of what was added, in hexadecimal digits.
    pub fn digest(self) -> String {
        let mut digits = String::with_capacity(64);
        for byte in self.0.finalize() {
            // Writing into a string cannot fail.
            let _ = write!(digits, "{byte:02x}");
        }
        digits
    }
}

/// An order as the hash takes it.
fn line(order: &Order) -> String {
    let mut line = format!(
        "{} {} {} {} {} {} {} {} {} {} {} {} {} ",
        order.id,
        order.buyer.0,
        order.epoch.0,
        order.seq,
        order.pseq,
        order.quantity,
        order.unit_price.amount,
        order.unit_price.currency.as_str(),
        order.status.as_str(),
        order.accepted_as.as_str(),
        order.durability.as_str(),
        order.receipt_key,
        order.accepted_at_ms,
    );
    for byte in order.fingerprint.0 {
        let _ = write!(line, "{byte:02x}");
    }
    let Order {
        hold_ms,
        extended_ms,
        returned,
        refunded,
        ..
    } = order;
    // A plain order has none of these; the line of one that went back as a whole says so already.
    let partly = *returned > 0 && order.status != Status::Cancelled;
    if *hold_ms > 0 || *refunded > 0 || partly {
        // Writing into a string cannot fail.
        let _ = write!(line, " {hold_ms} {extended_ms} {returned} {refunded}");
    }
    line.push('\n');
    line
}

/// Reads all orders of PostgreSQL.
pub(super) async fn read_stored(
    snapshot: &mut Snapshot,
    round: RoundId,
    hash: &mut OrdersHash,
) -> Result<(), AuditError> {
    let mut after = Place::default();
    loop {
        let page = snapshot.orders(round, after, PAGE).await?;
        let Some(last) = page.last() else {
            return Ok(());
        };
        after = place(last);
        for order in &page {
            hash.add(order);
        }
    }
}

/// Reads all orders and buyers of PostgreSQL, and what Redis has of each.
pub(super) async fn read_both(
    snapshot: &mut Snapshot,
    engine: &Engine,
    round: RoundId,
    sums: &RoundSums,
    hash: &mut OrdersHash,
) -> Result<Sides, AuditError> {
    match pages(snapshot, engine, round, sums, hash).await {
        // Redis answers, but what it has is none of what it should be.
        Err(AuditError::Engine(EngineError::Damaged(what) | EngineError::Protocol(what))) => {
            Ok(Sides::Damaged(what))
        }
        sides => sides,
    }
}

async fn pages(
    snapshot: &mut Snapshot,
    engine: &Engine,
    round: RoundId,
    sums: &RoundSums,
    hash: &mut OrdersHash,
) -> Result<Sides, AuditError> {
    let scope = sums.limit_scope;
    // What a limit over all rounds counts goes on in the other rounds while this one is looked at.
    let others_sell = scope == LimitScope::Sale && !sums.others_final;
    let (mut orders, mut board, mut buyers) = (Pair::default(), Pair::default(), Pair::default());
    let mut lacking = None;
    let mut after = Place::default();
    loop {
        let page = snapshot.orders(round, after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = place(last);
        let ids: Vec<OrderId> = page.iter().map(|order| order.id).collect();
        for (order, kept) in page.iter().zip(engine.records(round, &ids).await?) {
            hash.add(order);
            same_order(order, &kept, &mut orders, &mut lacking);
            same_place(order, &kept, &mut board, &mut lacking);
        }
    }
    snapshot.count_buyers(round, scope).await?;
    loop {
        let page = snapshot.next_buyers().await?;
        if page.is_empty() {
            break;
        }
        let ids: Vec<_> = page.iter().map(|sum| sum.buyer).collect();
        for (sum, kept) in page.iter().zip(engine.buyers(round, scope, &ids).await?) {
            buyers.postgres += 1;
            let (units, acceptances) = kept.unwrap_or_default();
            if kept.is_some() {
                buyers.redis += 1;
            }
            if (units, acceptances) != (sum.units, sum.orders)
                && (!others_sell || acceptances <= sum.orders)
            {
                buyers.differ(|| {
                    format!(
                        "buyer {} has {units} units in {acceptances} acceptances in Redis, {} in {} \
                         in PostgreSQL",
                        sum.buyer.0, sum.units, sum.orders
                    )
                });
            }
            if acceptances < sum.orders || (units < sum.units && !others_sell) {
                lacking.get_or_insert_with(|| format!("what buyer {} has", sum.buyer.0));
            }
        }
    }
    Ok(Sides::Read {
        orders,
        board,
        buyers,
        others_sell,
        lacking,
    })
}

fn same_order(order: &Order, kept: &Kept, orders: &mut Pair, lacking: &mut Option<String>) {
    orders.postgres += 1;
    match &kept.order {
        Some(record) => {
            orders.redis += 1;
            if record != order {
                orders.differ(|| format!("{} is not the same in both", name(order)));
            }
        }
        None => {
            orders.differ(|| format!("{} is only in PostgreSQL", name(order)));
            lacking.get_or_insert_with(|| name(order));
        }
    }
}

fn same_place(order: &Order, kept: &Kept, board: &mut Pair, lacking: &mut Option<String>) {
    let expected = (order.status == Status::Confirmed).then_some(order.seq);
    board.postgres += u64::from(expected.is_some());
    board.redis += u64::from(kept.place.is_some());
    let held = order.status == Status::Held;
    let until = order.hold_until_ms().filter(|_| held);
    if kept.hold_until_ms != until {
        board.differ(|| {
            let word = |until: Option<i64>| until.map_or("no hold".to_owned(), |ms| ms.to_string());
            let (redis, postgres) = (word(kept.hold_until_ms), word(until));
            format!(
                "{} is held until {redis} in Redis, {postgres} in PostgreSQL",
                name(order)
            )
        });
        if kept.hold_until_ms.is_none() {
            lacking.get_or_insert_with(|| format!("the hold of {}", name(order)));
        }
    }
    if kept.place == expected {
        return;
    }
    board.differ(|| match (kept.place, expected) {
        (Some(_), None) => format!("{} is only in Redis", name(order)),
        (None, _) => format!("{} is only in PostgreSQL", name(order)),
        (Some(place), _) => format!("{} has the place {place} in Redis", name(order)),
    });
    if kept.place.is_none() {
        lacking.get_or_insert_with(|| format!("the place of {}", name(order)));
    }
}

fn name(order: &Order) -> String {
    format!("order {} with seq {}", order.id, order.seq)
}

fn place(order: &Order) -> Place {
    Place {
        epoch: order.epoch,
        seq: order.seq,
    }
}
