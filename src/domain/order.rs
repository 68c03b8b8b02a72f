//! An order and the decision that makes it.

use super::{
    id::{BuyerId, Epoch, Fingerprint, JournalId, OrderId, RoundId},
    money::Money,
};

/// Where an order is in its life.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[schema(as = OrderStatus)]
pub enum Status {
    /// Its units wait for the payment.
    Held,
    /// Bought.
    Confirmed,
    /// The payment did not come in time; the units went back.
    Expired,
    /// Given back by the buyer or an operator; the units went back.
    Cancelled,
    /// The money went back.
    Refunded,
    /// A line of a cart that was not accepted as a whole: the tombstone of what never was bought.
    Withdrawn,
}

impl Status {
    const ALL: [Self; 6] = [
        Self::Held,
        Self::Confirmed,
        Self::Expired,
        Self::Cancelled,
        Self::Refunded,
        Self::Withdrawn,
    ];

    /// The byte of packed records and receipts.
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// Reads the byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }

    /// The word that the API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Confirmed => "confirmed",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Refunded => "refunded",
            Self::Withdrawn => "withdrawn",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }
}

/// What an acceptance survives, weakest first.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// The script ran; Redis syncs its file about once a second.
    Fast,
    /// Redis synced its file before it answered.
    Fsync,
    /// As many replicas as asked for had it, too.
    Replicated,
    /// PostgreSQL had it, too.
    Committed,
}

impl Durability {
    const ALL: [Self; 4] = [Self::Fast, Self::Fsync, Self::Replicated, Self::Committed];

    /// The byte of packed records and receipts.
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// Reads the byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }

    /// The word that the API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Fsync => "fsync",
            Self::Replicated => "replicated",
            Self::Committed => "committed",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|durability| durability.as_str() == word)
    }
}

/// What a sale asks of its acceptances.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[schema(as = DurabilityMode)]
pub enum Mode {
    /// What Redis' own settings give: `fsync` or `fast`.
    #[default]
    Default,
    /// A 201 only when enough replicas have it, too.
    Replicated,
    /// A 201 only when PostgreSQL has it, too.
    Committed,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Default, Self::Replicated, Self::Committed];

    /// The word that the API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Replicated => "replicated",
            Self::Committed => "committed",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == word)
    }
}

/// An accepted purchase of some units of one round by one buyer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Derived from sale, buyer and key.
    pub id: OrderId,
    /// What it took its units from.
    pub round: RoundId,
    /// Whose it is.
    pub buyer: BuyerId,
    /// Units, at least one.
    pub quantity: u64,
    /// The price of one unit at acceptance.
    pub unit_price: Money,
    /// Where it is now.
    pub status: Status,
    /// What it was at acceptance; this is what its 201 says, for ever.
    pub accepted_as: Status,
    /// What its acceptance survives.
    pub durability: Durability,
    /// The key that signs its receipt; 0 for an order from before there were receipts.
    pub receipt_key: u8,
    /// The timeline that accepted it.
    pub epoch: Epoch,
    /// Its place among the events of its round.
    pub seq: u64,
    /// The journal entry that carries it; stored once the position has reached it.
    pub pseq: u64,
    /// When, in milliseconds since the Unix epoch by Redis' clock.
    pub accepted_at_ms: i64,
    /// What the request asked for.
    pub fingerprint: Fingerprint,
    /// How long it may wait for its payment, in milliseconds from its acceptance; 0 for an order
    /// that was confirmed at once.
    pub hold_ms: u64,
    /// By how much that was extended, in milliseconds; 0 if it was not.
    pub extended_ms: u64,
    /// Units of it that are on sale again.
    pub returned: u64,
    /// Units of it that were refunded and stay sold.
    pub refunded: u64,
}

impl Order {
    /// The first instant at which it is held no more, milliseconds since the Unix epoch by Redis'
    /// clock; `None` for one that never was.
    pub fn hold_until_ms(&self) -> Option<i64> {
        let ms = i64::try_from(self.hold_ms + self.extended_ms).unwrap_or(i64::MAX);
        (self.hold_ms > 0).then(|| self.accepted_at_ms.saturating_add(ms))
    }

    /// The order as it was accepted: what happened since is another matter.
    #[must_use]
    pub fn as_accepted(self) -> Self {
        Self {
            status: self.accepted_as,
            extended_ms: 0,
            returned: 0,
            refunded: 0,
            ..self
        }
    }

    /// Units that count as taken: held or sold.
    pub fn taken(&self) -> u64 {
        self.quantity.saturating_sub(self.returned)
    }

    /// Units that the buyer still has.
    pub fn left(&self) -> u64 {
        self.taken().saturating_sub(self.refunded)
    }

    /// The journal entry that carries it.
    pub fn entry(&self) -> JournalId {
        JournalId {
            epoch: self.epoch,
            pseq: self.pseq,
        }
    }

    /// What the buyer pays for all units. Terms are checked so that it fits.
    pub fn total(&self) -> Money {
        self.unit_price
            .times(self.quantity)
            .unwrap_or(self.unit_price)
    }
}

/// What must be known of an acceptance to say that it was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acceptance {
    /// The order.
    pub order: OrderId,
    /// What it took its units from.
    pub round: RoundId,
    /// Whose it is.
    pub buyer: BuyerId,
    /// Units.
    pub quantity: u64,
    /// The journal entry that carries it.
    pub at: JournalId,
    /// Its place among the events of its round.
    pub seq: u64,
    /// What it survives.
    pub durability: Durability,
    /// When, in milliseconds since the Unix epoch by Redis' clock.
    pub accepted_at_ms: i64,
}

impl From<&Order> for Acceptance {
    fn from(order: &Order) -> Self {
        Self {
            order: order.id,
            round: order.round,
            buyer: order.buyer,
            quantity: order.quantity,
            at: order.entry(),
            seq: order.seq,
            durability: order.durability,
            accepted_at_ms: order.accepted_at_ms,
        }
    }
}

/// What a buyer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purchase {
    /// From which round.
    pub round: RoundId,
    /// The id its order will have, or has since an earlier attempt.
    pub order: OrderId,
    /// For whom.
    pub buyer: BuyerId,
    /// Units, 1 … 10^6.
    pub quantity: u64,
    /// What the request asked for.
    pub fingerprint: Fingerprint,
    /// What an acceptance will survive.
    pub durability: Durability,
    /// Whether a receipt proves that a lost epoch accepted it: then neither pause nor end of the
    /// round is in its way.
    pub redeem: bool,
    /// Archived rounds of the sale in which PostgreSQL does not have the order; 0 if nobody asked.
    pub archive: u32,
}

/// What became of a purchase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// A new order.
    Accepted(Order),
    /// The order that an earlier attempt with the same key made.
    Replayed(Order),
    /// Nothing happened.
    Refused(Refusal),
}

/// Why a purchase was refused, in order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The key made an order from another request.
    Mismatch,
    /// The order may be in an archived round: PostgreSQL must be asked before anything is decided.
    Archived {
        /// Archived rounds of the sale.
        rounds: u32,
    },
    /// Before the window.
    NotOpen {
        /// When it opens, milliseconds since the Unix epoch.
        opens_at_ms: i64,
    },
    /// Stopped by the operator.
    Paused,
    /// After the window, or closed.
    Closed,
    /// More than one order may ask for.
    OrderLimit {
        /// The limit per order.
        limit: u64,
        /// Units that the buyer has.
        held: u64,
    },
    /// More than one buyer may have.
    BuyerLimit {
        /// The limit per buyer.
        limit: u64,
        /// Units that the buyer has.
        held: u64,
    },
    /// Nothing is left.
    SoldOut,
    /// Something is left, but less than asked for.
    Insufficient {
        /// Units left.
        remaining: u64,
    },
    /// It would be accepted, but another line of the same cart is not.
    LeftOut,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_back() {
        for status in [
            Status::Held,
            Status::Confirmed,
            Status::Expired,
            Status::Cancelled,
            Status::Refunded,
            Status::Withdrawn,
        ] {
            assert_eq!(Status::parse(status.as_str()), Some(status));
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
            assert_eq!(Status::from_byte(status.byte()), Some(status));
        }
        for durability in [
            Durability::Fast,
            Durability::Fsync,
            Durability::Replicated,
            Durability::Committed,
        ] {
            assert_eq!(Durability::parse(durability.as_str()), Some(durability));
            assert_eq!(Durability::from_byte(durability.byte()), Some(durability));
            assert_eq!(
                serde_json::to_value(durability).unwrap(),
                durability.as_str()
            );
        }
        for mode in Mode::ALL {
            assert_eq!(Mode::parse(mode.as_str()), Some(mode));
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.as_str());
        }
        assert_eq!(Status::parse("lost"), None);
    }
}
