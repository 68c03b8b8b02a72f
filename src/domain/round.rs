//! A round: one running of a sale, with its own stock, limits, orders and leaderboard.

use super::{
    limits::{ALLOCATION_MAX, BUYER_LIMIT_MAX, HOLD_MS_MAX, HOLD_MS_MIN},
    money::Money,
};

/// When a round sells: from `opens_at_ms` on, and before `closes_at_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First instant of selling, milliseconds since the Unix epoch by Redis' clock.
    pub opens_at_ms: i64,
    /// First instant after selling; `None` sells until closed.
    pub closes_at_ms: Option<i64>,
}

/// What the operator wants. The passing of time is never stored: see [`State`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Sell while the window is open.
    Live,
    /// Do not sell for now.
    Paused,
    /// Never sell again.
    Closed,
    /// Over, and no unit goes back any more: its orders are final.
    Settled,
    /// Only PostgreSQL has its orders.
    Archived,
}

impl Intent {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Live,
        Self::Paused,
        Self::Closed,
        Self::Settled,
        Self::Archived,
    ];

    /// The word that Redis and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Paused => "paused",
            Self::Closed => "closed",
            Self::Settled => "settled",
            Self::Archived => "archived",
        }
    }

    /// Whether it is the end, whatever the window says.
    pub fn is_over(self) -> bool {
        self == Self::Closed || self.is_final()
    }

    /// Whether its orders can change no more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Settled | Self::Archived)
    }
}

/// What a round is at an instant, derived from intent, window and clock.
#[derive(
    Clone,
    Copy,
    Debug,
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
#[schema(as = SaleState)]
pub enum State {
    /// Before its window.
    Scheduled,
    /// Selling.
    Open,
    /// Inside its window, stopped by the operator, or only redeeming receipts after a loss.
    Paused,
    /// Past its window, or closed by the operator.
    Closed,
}

impl State {
    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Open => "open",
            Self::Paused => "paused",
            Self::Closed => "closed",
        }
    }
}

/// What a round is at `now_ms`.
///
/// Closed is final and wins. Before the start a pause does not show yet: the round would not sell
/// anyway, and the buyer wants to know when it starts.
pub fn state(intent: Intent, window: Window, now_ms: i64) -> State {
    if intent.is_over() || window.closes_at_ms.is_some_and(|end| now_ms >= end) {
        State::Closed
    } else if now_ms < window.opens_at_ms {
        State::Scheduled
    } else if intent == Intent::Paused {
        State::Paused
    } else {
        State::Open
    }
}

/// Where the units of a round are, as of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Units given to the round so far.
    pub allocation: u64,
    /// Units to be had.
    pub remaining: u64,
    /// Units of orders that wait for their payment.
    pub held: u64,
    /// Units of confirmed orders.
    pub sold: u64,
    /// The number of the last event.
    pub seq: u64,
}

impl Counters {
    /// A round that nothing has happened to.
    pub fn fresh(allocation: u64) -> Self {
        Self {
            allocation,
            remaining: allocation,
            ..Self::default()
        }
    }

    /// Conservation: every unit is in exactly one place.
    pub fn balanced(&self) -> bool {
        self.remaining
            .checked_add(self.held)
            .and_then(|sum| sum.checked_add(self.sold))
            == Some(self.allocation)
    }
}

/// The rules of a round, fixed when it is provisioned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// When it sells.
    pub window: Window,
    /// Units that one buyer may hold, 1 … [`BUYER_LIMIT_MAX`].
    pub per_buyer_limit: u64,
    /// Units that one order may ask for, 1 … the limit per buyer.
    pub per_order_limit: u64,
    /// The price of one unit.
    pub unit_price: Money,
    /// Units to start with, 1 … [`ALLOCATION_MAX`].
    pub allocation: u64,
    /// What it does beyond selling at once.
    pub policy: Policy,
}

/// What a round does beyond selling at once. The default is a plain round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// How long an order may wait for its payment, in milliseconds, 1,000 … [`HOLD_MS_MAX`]; without
    /// it, orders are confirmed at once.
    pub hold_ms: Option<u64>,
    /// What the limit per buyer counts over. The same for all rounds of a sale.
    pub limit_scope: LimitScope,
    /// What ends it, beside its window and the operator.
    pub ends: Ends,
    /// Whether buyers may wait in line for units that come back. Only with holds.
    pub waitlist: bool,
}

/// What a limit per buyer counts over.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum LimitScope {
    /// Each round by itself.
    #[default]
    Round,
    /// All rounds of the sale together.
    Sale,
}

impl LimitScope {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Round, Self::Sale];

    /// The word that the API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Round => "round",
            Self::Sale => "sale",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == word)
    }
}

/// What ends a round, beside its window and the operator.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Ends {
    /// Nothing: units that come back are for sale again.
    #[default]
    Time,
    /// It closes once nothing remains and nothing is held.
    SoldOut,
}

impl Ends {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Time, Self::SoldOut];

    /// The word that the API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::SoldOut => "sold_out",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ends| ends.as_str() == word)
    }
}

/// What an amendment changes: the rules of a round but for its stock, its scope and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amendment {
    /// When it sells.
    pub window: Window,
    /// Units that one buyer may hold.
    pub per_buyer_limit: u64,
    /// Units that one order may ask for.
    pub per_order_limit: u64,
    /// The price of one unit.
    pub unit_price: Money,
    /// How long an order may wait for its payment, in milliseconds.
    pub hold_ms: Option<u64>,
}

impl From<&Terms> for Amendment {
    fn from(terms: &Terms) -> Self {
        Self {
            window: terms.window,
            per_buyer_limit: terms.per_buyer_limit,
            per_order_limit: terms.per_order_limit,
            unit_price: terms.unit_price,
            hold_ms: terms.policy.hold_ms,
        }
    }
}

/// Why terms are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    /// Out of bounds.
    #[error("allocation is 1 to {ALLOCATION_MAX} units")]
    Allocation,
    /// Out of bounds.
    #[error("per_buyer_limit is 1 to {BUYER_LIMIT_MAX} units")]
    BuyerLimit,
    /// Out of bounds.
    #[error("per_order_limit is 1 to per_buyer_limit units")]
    OrderLimit,
    /// Ends before it starts.
    #[error("closes_at must be later than opens_at")]
    Window,
    /// One order could cost more than money can say.
    #[error("price times per_order_limit is too large")]
    Total,
    /// Out of bounds.
    #[error("hold_seconds is 1 to 86400")]
    Hold,
    /// What comes back is offered as a hold.
    #[error("a waitlist needs hold_seconds: units that come back are held for the next in line")]
    Waitlist,
}

impl Terms {
    /// These terms with what an amendment says.
    #[must_use]
    pub fn amended(mut self, by: &Amendment) -> Self {
        self.window = by.window;
        self.per_buyer_limit = by.per_buyer_limit;
        self.per_order_limit = by.per_order_limit;
        self.unit_price = by.unit_price;
        self.policy.hold_ms = by.hold_ms;
        self
    }

    /// Checks the bounds, one after the other.
    ///
    /// # Errors
    /// The first [`TermsError`] that applies.
    pub fn check(&self) -> Result<(), TermsError> {
        let total = self.unit_price.times(self.per_order_limit);
        if !(1..=ALLOCATION_MAX).contains(&self.allocation) {
            Err(TermsError::Allocation)
        } else if !(1..=BUYER_LIMIT_MAX).contains(&self.per_buyer_limit) {
            Err(TermsError::BuyerLimit)
        } else if !(1..=self.per_buyer_limit).contains(&self.per_order_limit) {
            Err(TermsError::OrderLimit)
        } else if self
            .window
            .closes_at_ms
            .is_some_and(|end| end <= self.window.opens_at_ms)
        {
            Err(TermsError::Window)
        } else if total.is_none_or(|total| total.amount > super::limits::AMOUNT_MAX) {
            Err(TermsError::Total)
        } else if self
            .policy
            .hold_ms
            .is_some_and(|ms| !(HOLD_MS_MIN..=HOLD_MS_MAX).contains(&ms))
        {
            Err(TermsError::Hold)
        } else if self.policy.waitlist && self.policy.hold_ms.is_none() {
            Err(TermsError::Waitlist)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_follows_the_clock_and_closed_is_final() {
        let window = Window {
            opens_at_ms: 10,
            closes_at_ms: Some(20),
        };
        let endless = Window {
            closes_at_ms: None,
            ..window
        };
        for (intent, window, now, expected) in [
            (Intent::Live, window, 9, State::Scheduled),
            (Intent::Live, window, 10, State::Open),
            (Intent::Live, window, 19, State::Open),
            (Intent::Live, window, 20, State::Closed),
            (Intent::Live, endless, 1 << 40, State::Open),
            (Intent::Paused, window, 9, State::Scheduled),
            (Intent::Paused, window, 10, State::Paused),
            (Intent::Paused, window, 20, State::Closed),
            (Intent::Closed, window, 9, State::Closed),
            (Intent::Closed, window, 15, State::Closed),
            (Intent::Settled, window, 9, State::Closed),
            (Intent::Archived, endless, 15, State::Closed),
        ] {
            assert_eq!(
                state(intent, window, now),
                expected,
                "{intent:?} {window:?} {now}"
            );
        }
    }
}
