//! The packed values that scripts and Rust exchange. The formats are those of `lua/shared/`.
//!
//! Numbers are big-endian; `I6` is a number of six bytes.

use bytes::Bytes;
use uuid::Uuid;

use crate::domain::{
    id::{BuyerId, Epoch, Fingerprint, OperationId, OrderId, RoundId, SaleNumber},
    journal::{Event, EventKind},
    model::Wish,
    money::{Currency, Money},
    order::{Durability, Order, Purchase, Status},
    round::{Amendment, Counters, Ends, Intent, LimitScope, Policy, State, Window},
};

/// The version of records and journal entries that this build writes.
pub(super) const VERSION: u8 = 2;
/// The version of entries that end a round, as builds before the next wrote them.
const VERSION_END: u8 = 3;
/// The version of entries with an event or a hold: a build without such things stops at them.
pub(super) const VERSION_LIFE: u8 = 4;
/// The version of the record of an order that was held, or partly given back.
const VERSION_RECORD_LIFE: u8 = 3;
/// The oldest version that it reads: its records have no key of a receipt.
pub(super) const VERSION_MIN: u8 = 1;

/// Bytes of an order's record.
const RECORD_BYTES: usize = 70;
/// Bytes of another event in a journal entry of this version, and of those before.
const EVENT_BYTES: usize = EVENT_END_BYTES + 8;
const EVENT_END_BYTES: usize = 1 + 6 + 1 + 16 + 6 + 16 + 16;
/// Added to the kind of an event whose units were held before it.
const FROM_HELD: u8 = 128;
/// Bytes of what an event amends.
pub(super) const AMENDMENT_BYTES: usize = 1 + 6 + 6 + 6 + 4 + 4 + 11 + 4;
/// Bytes of the counters of a round.
pub(super) const COUNTERS_BYTES: usize = 4 + 4 + 5 * 6;
/// Bytes of one purchase in the arguments of its script.
pub(super) const ITEM_BYTES: usize = 1 + 16 + 16 + 4 + 8 + 1 + 1 + 4;

/// Bytes of another event in a journal entry of this version.
pub(super) fn event_bytes(version: u8) -> usize {
    match version {
        VERSION_MIN..=VERSION_END => EVENT_END_BYTES,
        _ => EVENT_BYTES,
    }
}

/// Where a round is at an instant: what every reply says about every round it read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Which round.
    pub round: RoundId,
    /// The timeline that the reply belongs to.
    pub epoch: Epoch,
    /// Where its units are.
    pub counters: Counters,
    /// What the operator wants.
    pub intent: Intent,
    /// What that makes of it at `now_ms`.
    pub state: State,
    /// When it sells.
    pub window: Window,
    /// Units that one order may ask for.
    pub per_order_limit: u64,
    /// Orders of the sale, all its rounds together; it never falls.
    pub orders: u64,
    /// Rounds of the sale whose orders only PostgreSQL has.
    pub archived_rounds: u32,
    /// Buyers that wait for units to come back.
    pub waiting: u64,
    /// The instant, milliseconds since the Unix epoch by Redis' clock.
    pub now_ms: i64,
}

impl Standing {
    /// Whether nothing is left for whoever comes now: what comes back goes to those in line first.
    pub fn sold_out(&self) -> bool {
        self.counters.remaining == 0 || self.waiting > 0
    }
}

/// Takes packed values apart; `None` when there are too few bytes or a value has no meaning.
pub(super) struct Unpack<'a>(pub(super) &'a [u8]);

impl<'a> Unpack<'a> {
    fn take<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| *byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().copied().map(u32::from_be_bytes)
    }

    fn u48(&mut self) -> Option<u64> {
        let [a, b, c, d, e, f] = *self.take::<6>()?;
        Some(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    fn instant(&mut self) -> Option<i64> {
        self.u48()?.try_into().ok()
    }

    fn uuid(&mut self) -> Option<Uuid> {
        self.take().copied().map(Uuid::from_bytes)
    }

    fn money(&mut self) -> Option<Money> {
        let amount = i64::from_be_bytes(*self.take()?);
        let currency = Currency::parse(str::from_utf8(self.take::<3>()?).ok()?).ok()?;
        Money::new(amount, currency).ok()
    }

    /// `RECORD`.
    pub(super) fn order(&mut self, id: OrderId) -> Option<Order> {
        let version = self.byte()?;
        if !(VERSION_MIN..=VERSION_RECORD_LIFE).contains(&version) {
            return None;
        }
        let status = Status::from_byte(self.byte()?)?;
        let accepted_as = Status::from_byte(self.byte()?)?;
        let durability = Durability::from_byte(self.byte()?)?;
        let receipt_key = if version == VERSION_MIN {
            0
        } else {
            self.byte()?
        };
        let mut order = Order {
            id,
            status,
            accepted_as,
            durability,
            receipt_key,
            round: RoundId {
                sale: id.sale(),
                round: self.u32()?,
            },
            epoch: Epoch(self.u32()?),
            seq: self.u48()?,
            pseq: self.u48()?,
            quantity: self.u32()?.into(),
            unit_price: self.money()?,
            accepted_at_ms: self.instant()?,
            hold_ms: 0,
            extended_ms: 0,
            returned: 0,
            refunded: 0,
            fingerprint: Fingerprint::default(),
            buyer: BuyerId(Uuid::nil()),
        };
        if version == VERSION_RECORD_LIFE {
            order.hold_ms = self.u32()?.into();
            order.extended_ms = self.u32()?.into();
            order.returned = self.u32()?.into();
            order.refunded = self.u32()?.into();
        } else if status == Status::Cancelled {
            order.returned = order.quantity;
        }
        order.fingerprint = Fingerprint(*self.take()?);
        order.buyer = BuyerId(self.uuid()?);
        Some(order)
    }

    /// Whether nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `COUNTERS`.
    pub(super) fn counters(&mut self) -> Option<(RoundId, Counters)> {
        let round = RoundId {
            sale: SaleNumber(self.u32()?),
            round: self.u32()?,
        };
        let counters = Counters {
            allocation: self.u48()?,
            remaining: self.u48()?,
            held: self.u48()?,
            sold: self.u48()?,
            seq: self.u48()?,
        };
        Some((round, counters))
    }

    /// `COUNTERS` and `STANDING`.
    pub(super) fn standing(&mut self, epoch: Epoch, now_ms: i64) -> Option<Standing> {
        let (round, counters) = self.counters()?;
        let intent = match self.byte()? {
            0 => Intent::Live,
            1 => Intent::Paused,
            2 => Intent::Closed,
            3 => Intent::Settled,
            4 => Intent::Archived,
            _ => return None,
        };
        let state = match self.byte()? {
            0 => State::Scheduled,
            1 => State::Open,
            2 => State::Paused,
            3 => State::Closed,
            _ => return None,
        };
        let opens_at_ms = self.instant()?;
        let closes_at_ms = Some(self.instant()?).filter(|end| *end > 0);
        let window = Window {
            opens_at_ms,
            closes_at_ms,
        };
        let per_order_limit = self.u32()?.into();
        let orders = self.u48()?;
        let archived_rounds = self.u32()?;
        let waiting = self.u32()?.into();
        Some(Standing {
            round,
            epoch,
            counters,
            intent,
            state,
            window,
            per_order_limit,
            orders,
            archived_rounds,
            waiting,
            now_ms,
        })
    }

    /// One acceptance of a journal entry: index of its round, and the order.
    pub(super) fn acceptance(&mut self) -> Option<(u8, Order)> {
        let index = self.byte()?;
        let id = OrderId(self.uuid()?);
        Some((index, self.order(id)?))
    }

    /// `EVENT_FORMAT`: index of its round, and the event without its round. Those of entries before
    /// [`VERSION_LIFE`] have no fingerprint: what a restock asked for is what it did.
    pub(super) fn event(&mut self, version: u8) -> Option<(u8, Event)> {
        let index = self.byte()?;
        let seq = self.u48()?;
        let kind = self.byte()?;
        let from_held = kind >= FROM_HELD;
        let kind = *EventKind::ALL.get(usize::from(kind % FROM_HELD))?;
        let order = Some(OrderId(self.uuid()?)).filter(|id| !id.0.is_nil());
        let units = self.u48()?;
        let actor = Some(self.uuid()?).filter(|id| !id.is_nil());
        let operation = Some(OperationId(self.uuid()?)).filter(|id| !id.0.is_nil());
        let fingerprint = if version < VERSION_LIFE {
            operation.map(|_| Fingerprint::units(kind.as_str(), units))
        } else {
            Some(Fingerprint(*self.take()?)).filter(|print| *print != Fingerprint::default())
        };
        let event = Event {
            round: None,
            seq,
            kind,
            order,
            units,
            fingerprint,
            from_held,
            amendment: None,
            actor,
            operation,
        };
        Some((index, event))
    }

    /// `TERMS`: index of its round, seq of the event, and what it changes.
    pub(super) fn amendment(&mut self) -> Option<(u8, u64, Amendment)> {
        let index = self.byte()?;
        let seq = self.u48()?;
        let opens_at_ms = self.instant()?;
        let closes_at_ms = Some(self.instant()?).filter(|end| *end > 0);
        let window = Window {
            opens_at_ms,
            closes_at_ms,
        };
        let amendment = Amendment {
            window,
            per_buyer_limit: self.u32()?.into(),
            per_order_limit: self.u32()?.into(),
            unit_price: self.money()?,
            hold_ms: Some(self.u32()?.into()).filter(|ms| *ms > 0),
        };
        Some((index, seq, amendment))
    }

    /// `BUYER`: units and acceptances.
    pub(super) fn buyer(&mut self) -> Option<(u64, u64)> {
        Some((self.u32()?.into(), self.u32()?.into()))
    }

    /// Two counts: `>I6I6`.
    pub(super) fn pair(&mut self) -> Option<(u64, u64)> {
        Some((self.u48()?, self.u48()?))
    }
}

/// `RECORD`: an order, as its script would have written it. One without the key of a receipt is
/// written in the version that had none, one that was never held and is whole in the one before
/// there were holds.
pub(super) fn record(order: &Order) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RECORD_BYTES + 16);
    let gone = if order.status == Status::Cancelled {
        order.quantity
    } else {
        0
    };
    let plain = order.hold_ms == 0 && order.refunded == 0 && order.returned == gone;
    let version = match order.receipt_key {
        _ if !plain || order.status == Status::Withdrawn => VERSION_RECORD_LIFE,
        0 => VERSION_MIN,
        _ => VERSION,
    };
    let u32 = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
    bytes.extend([
        version,
        order.status.byte(),
        order.accepted_as.byte(),
        order.durability.byte(),
    ]);
    if version != VERSION_MIN {
        bytes.push(order.receipt_key);
    }
    bytes.extend(order.round.round.to_be_bytes());
    bytes.extend(order.epoch.0.to_be_bytes());
    push_u48(&mut bytes, order.seq);
    push_u48(&mut bytes, order.pseq);
    bytes.extend(u32(order.quantity));
    bytes.extend(price(order.unit_price));
    push_u48(&mut bytes, order.accepted_at_ms.unsigned_abs());
    if version == VERSION_RECORD_LIFE {
        bytes.extend(u32(order.hold_ms));
        bytes.extend(u32(order.extended_ms));
        bytes.extend(u32(order.returned));
        bytes.extend(u32(order.refunded));
    }
    bytes.extend(order.fingerprint.0);
    bytes.extend(order.buyer.0.as_bytes());
    bytes
}

/// `WISH`: what a buyer in the line waits for.
pub(super) fn wish(wish: &Wish) -> Vec<u8> {
    let mut bytes = wish.order.0.as_bytes().to_vec();
    bytes.extend(wish.fingerprint.0);
    bytes.extend(u32::try_from(wish.units).unwrap_or(u32::MAX).to_be_bytes());
    bytes
}

/// What acceptances of those in line survive, for the arguments of a script; 255: nothing is offered.
pub(super) fn durability(durability: Option<Durability>) -> Bytes {
    let byte = durability.map_or(255, Durability::byte);
    Bytes::from(byte.to_string())
}

/// The bits of a round's policy, beside its hold.
pub(super) fn policy(policy: &Policy) -> u8 {
    u8::from(policy.limit_scope == LimitScope::Sale)
        + 2 * u8::from(policy.ends == Ends::SoldOut)
        + 4 * u8::from(policy.waitlist)
}

/// Reads them back.
pub(super) fn read_policy(bits: u8, hold_ms: u64) -> Policy {
    Policy {
        hold_ms: Some(hold_ms).filter(|ms| *ms > 0),
        limit_scope: LimitScope::ALL[usize::from(bits & 1)],
        ends: Ends::ALL[usize::from(bits >> 1 & 1)],
        waitlist: bits & 4 != 0,
    }
}

/// `OPERATION`: what an operation asked for, and the seq it took.
pub(super) fn operation(fingerprint: Fingerprint, seq: u64) -> Vec<u8> {
    let mut bytes = fingerprint.0.to_vec();
    push_u48(&mut bytes, seq);
    bytes
}

/// `BUYER`: the units that a buyer has, and the acceptances that the buyer ever got.
pub(super) fn buyer(units: u64, acceptances: u64) -> Vec<u8> {
    [units, acceptances]
        .into_iter()
        .flat_map(|count| u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes())
        .collect()
}

fn push_u48(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend_from_slice(&number.to_be_bytes()[2..]);
}

/// The eleven bytes of a price.
pub(super) fn price(money: Money) -> [u8; 11] {
    let mut bytes = [0; 11];
    bytes[..8].copy_from_slice(&money.amount.to_be_bytes());
    bytes[8..].copy_from_slice(&money.currency.bytes());
    bytes
}

/// Appends `ITEM`: a purchase for the arguments of its script.
pub(super) fn push_item(bytes: &mut Vec<u8>, round_index: u8, purchase: &Purchase) {
    bytes.push(round_index);
    bytes.extend_from_slice(purchase.order.0.as_bytes());
    // As a record ends, so that the script compares both at once.
    bytes.extend_from_slice(&purchase.fingerprint.0);
    bytes.extend_from_slice(purchase.buyer.0.as_bytes());
    let quantity = u32::try_from(purchase.quantity).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&quantity.to_be_bytes());
    bytes.push(purchase.durability.byte());
    bytes.push(purchase.redeem.into());
    bytes.extend_from_slice(&purchase.archive.to_be_bytes());
}

/// `CALLER`: the caller's view of the partition.
pub(super) fn caller(epoch: Epoch, floor: u64, expected_ms: i64, not_after_ms: i64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(22);
    bytes.extend_from_slice(&epoch.0.to_be_bytes());
    for number in [
        floor,
        expected_ms.unsigned_abs(),
        not_after_ms.unsigned_abs(),
    ] {
        bytes.extend_from_slice(&number.to_be_bytes()[2..]);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_version_before_reads_back_without_a_key() {
        let id = OrderId(Uuid::nil());
        let record = |head: &[u8]| {
            let mut bytes = head.to_vec();
            bytes.extend([0, 0, 0, 1]); // round
            bytes.extend([0, 0, 0, 2]); // epoch
            bytes.extend([0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 4]); // seq, pseq
            bytes.extend([0, 0, 0, 5]); // quantity
            bytes.extend([0, 0, 0, 0, 0, 0, 0, 6]);
            bytes.extend(b"EUR");
            bytes.extend([0, 0, 0, 0, 0, 7]); // accepted
            bytes.extend([8; 24]);
            bytes
        };
        let (old, new) = (record(&[1, 1, 1, 1]), record(&[2, 1, 1, 1, 9]));
        let (old, new) = (Unpack(&old).order(id), Unpack(&new).order(id));
        assert_eq!(old.unwrap().receipt_key, 0);
        let expected = Order {
            receipt_key: 9,
            ..old.unwrap()
        };
        assert_eq!(new, Some(expected));
        assert_eq!(expected.quantity, 5);
    }

    #[test]
    fn too_few_bytes_and_unknown_values_are_no_value() {
        let id = OrderId(Uuid::nil());
        assert_eq!(Unpack(&[1; RECORD_BYTES - 1]).order(id), None);
        let mut record = [0; RECORD_BYTES];
        record[0] = VERSION_RECORD_LIFE + 1;
        assert_eq!(Unpack(&record).order(id), None);
        let mut event = [0; EVENT_BYTES];
        event[7] = 99;
        assert_eq!(Unpack(&event).event(VERSION_LIFE), None);
    }
}
