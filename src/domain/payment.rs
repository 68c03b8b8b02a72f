//! A payment: what is to be done next, and what becomes of it by what is learnt. Pure, so that
//! every interleaving of buyer, gateway, expiry and crash can be tried.
//!
//! What is known of the gateway is always asked anew before something is done; a webhook only says
//! that it is time to ask. So late, repeated and reordered ones change nothing.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{id::PaymentId, money::Money};

/// Who moves the money.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Gateway {
    /// Nobody: it behaves like a bank, with toy money.
    Sandbox,
    /// Stripe.
    Stripe,
    /// PayPal.
    Paypal,
}

impl Gateway {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sandbox, Self::Stripe, Self::Paypal];

    /// The word that configuration, API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox",
            Self::Stripe => "stripe",
            Self::Paypal => "paypal",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|gateway| gateway.as_str() == word)
    }
}

impl fmt::Display for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a bank said no, in words that a buyer can do something with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decline {
    /// Not enough money.
    InsufficientFunds,
    /// The card has expired.
    ExpiredCard,
    /// Number, check digits or kind are wrong.
    InvalidMethod,
    /// The buyer did not prove to be the owner.
    AuthenticationFailed,
    /// The bank wants no more of these.
    LimitExceeded,
    /// The reservation lapsed before it was used.
    Lapsed,
    /// The bank does not say.
    Declined,
}

impl Decline {
    const ALL: [Self; 7] = [
        Self::InsufficientFunds,
        Self::ExpiredCard,
        Self::InvalidMethod,
        Self::AuthenticationFailed,
        Self::LimitExceeded,
        Self::Lapsed,
        Self::Declined,
    ];

    /// The word that API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InsufficientFunds => "insufficient_funds",
            Self::ExpiredCard => "expired_card",
            Self::InvalidMethod => "invalid_method",
            Self::AuthenticationFailed => "authentication_failed",
            Self::LimitExceeded => "limit_exceeded",
            Self::Lapsed => "lapsed",
            Self::Declined => "declined",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|decline| decline.as_str() == word)
    }
}

/// How far a payment has come.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[schema(as = PaymentState)]
pub enum State {
    /// It is meant; whether the gateway has heard of it is another matter.
    Created,
    /// The buyer has to do something at the bank.
    RequiresAction,
    /// The bank thinks.
    Pending,
    /// The money is reserved; the order is to be confirmed.
    Authorised,
    /// The order is confirmed; the money is to be taken.
    Capturing,
    /// The money is ours.
    Captured,
    /// The order could not be had: the money is to be let go.
    Releasing,
    /// The order is confirmed, and its money is gone: the order is to be taken back.
    Revoking,
    /// Nothing was taken.
    Voided,
    /// The bank said no; nothing was taken.
    Declined,
    /// All that was taken was given back.
    Refunded,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Created,
        Self::RequiresAction,
        Self::Pending,
        Self::Authorised,
        Self::Capturing,
        Self::Captured,
        Self::Releasing,
        Self::Revoking,
        Self::Voided,
        Self::Declined,
        Self::Refunded,
    ];

    /// The word that API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::RequiresAction => "requires_action",
            Self::Pending => "pending",
            Self::Authorised => "authorised",
            Self::Capturing => "capturing",
            Self::Captured => "captured",
            Self::Releasing => "releasing",
            Self::Revoking => "revoking",
            Self::Voided => "voided",
            Self::Declined => "declined",
            Self::Refunded => "refunded",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// Whether it may still confirm its orders, or has: no other payment may try meanwhile.
    pub fn is_live(self) -> bool {
        !matches!(
            self,
            Self::Releasing | Self::Voided | Self::Declined | Self::Refunded
        )
    }

    /// Whether nothing is left to do but what operators ask for later.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Captured | Self::Voided | Self::Declined | Self::Refunded
        )
    }

    /// Whether the buyer may still be asked for something: nothing is reserved yet.
    fn is_early(self) -> bool {
        matches!(self, Self::Created | Self::RequiresAction | Self::Pending)
    }
}

/// What a gateway has of a payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// It knows of it; nobody has tried to pay yet.
    Open,
    /// The buyer has to do something.
    RequiresAction,
    /// It thinks.
    Pending,
    /// The whole amount is reserved.
    Authorised,
    /// So much was taken, and so much of that given back.
    Captured {
        /// Minor units.
        amount: i64,
        /// Minor units, at most `amount`.
        refunded: i64,
    },
    /// Nothing is reserved or taken, and nothing will be.
    Voided,
    /// The bank said no.
    Declined(Decline),
}

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Todo {
    /// Tell the gateway of it.
    Open,
    /// Have the money reserved.
    Authorise,
    /// Wait for the buyer or the bank; look again from time to time.
    Wait,
    /// Confirm the orders, before they expire.
    Confirm,
    /// Take the money: so many minor units.
    Capture(i64),
    /// Let the reserved money go.
    Void,
    /// The money was taken for an order that has expired: buy its units again, or give it back.
    BuyAgain,
    /// Take the order back.
    Revoke,
    /// Give money back.
    Refund,
    /// Nothing.
    Nothing,
}

/// Something learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fact {
    /// The gateway knows of it.
    Opened,
    /// What the gateway has.
    Seen(Seen),
    /// Another amount, currency or payment than asked for: nothing of it may be believed.
    Disagrees,
    /// Orders worth so much are confirmed; the others can not be had any more.
    Confirmed(i64),
    /// None of its orders can be had any more, or the buyer has changed its mind.
    Gone,
    /// New orders hold the units now: those are to be confirmed.
    BoughtAgain,
    /// They could not be: everything is to be given back.
    NotToBeHad,
    /// The orders were taken back.
    Revoked,
    /// So much is to be given back.
    RefundDue(i64),
    /// So much was.
    Refunded(i64),
}

/// The course of a payment: all of it that decides what happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Course {
    /// How far it has come.
    pub state: State,
    /// Whether the gateway knows of it.
    pub opened: bool,
    /// Whether its orders are those that were bought again.
    pub again: bool,
    /// What the buyer is asked for, minor units, above zero.
    pub amount: i64,
    /// What its confirmed orders are worth: what is to be taken.
    pub to_capture: i64,
    /// What was taken.
    pub captured: i64,
    /// What was given back.
    pub refunded: i64,
    /// What is still to be given back.
    pub refund_due: i64,
}

impl Course {
    /// The beginning.
    pub fn new(amount: i64) -> Self {
        Self {
            state: State::Created,
            opened: false,
            again: false,
            amount,
            to_capture: 0,
            captured: 0,
            refunded: 0,
            refund_due: 0,
        }
    }

    /// What there is to do.
    pub fn next(&self) -> Todo {
        match self.state {
            State::Created if !self.opened => Todo::Open,
            State::Created => Todo::Authorise,
            State::RequiresAction | State::Pending => Todo::Wait,
            State::Authorised => Todo::Confirm,
            State::Capturing => Todo::Capture(self.to_capture),
            State::Releasing if self.captured > 0 => Todo::BuyAgain,
            State::Releasing => Todo::Void,
            State::Revoking => Todo::Revoke,
            _ if self.refund_due > 0 => Todo::Refund,
            State::Captured | State::Voided | State::Declined | State::Refunded => Todo::Nothing,
        }
    }

    /// The course after `fact`. What contradicts what is known changes nothing: the gateway is
    /// asked again, and the audit says what does not add up.
    #[must_use]
    pub fn after(mut self, fact: Fact) -> Self {
        match fact {
            Fact::Opened => self.opened = true,
            Fact::Seen(seen) => self.see(seen),
            // Nothing is confirmed for money that is not what it should be. Once it was authorised,
            // somebody may have confirmed already: only who confirms may say that it is gone.
            Fact::Disagrees if self.state.is_early() => self.let_go(),
            Fact::Gone if self.state.is_early() || self.state == State::Authorised => self.let_go(),
            Fact::Confirmed(amount) if self.state == State::Authorised => {
                self.to_capture = amount;
                self.state = State::Capturing;
                if self.captured > 0 {
                    self.keep();
                }
            }
            // They are only held: should somebody have decided otherwise meanwhile, they expire.
            Fact::BoughtAgain if self.todo_is(Todo::BuyAgain) && !self.again => {
                self.again = true;
                self.state = State::Authorised;
            }
            Fact::NotToBeHad if self.todo_is(Todo::BuyAgain) => {
                self.to_capture = 0;
                self.keep();
            }
            Fact::Revoked if self.state == State::Revoking => {
                self.to_capture = 0;
                if self.captured > 0 {
                    self.keep();
                } else {
                    self.state = State::Voided;
                }
            }
            Fact::RefundDue(amount)
                if self.state == State::Captured
                    && amount > 0
                    && self.refunded + self.refund_due + amount <= self.captured =>
            {
                self.refund_due += amount;
            }
            Fact::Refunded(amount)
                if self.todo_is(Todo::Refund) && (1..=self.refund_due).contains(&amount) =>
            {
                self.refund_due -= amount;
                self.refunded += amount;
                if self.refunded == self.captured {
                    self.state = State::Refunded;
                }
            }
            Fact::Disagrees
            | Fact::Gone
            | Fact::Confirmed(_)
            | Fact::BoughtAgain
            | Fact::NotToBeHad
            | Fact::Revoked
            | Fact::RefundDue(_)
            | Fact::Refunded(_) => {}
        }
        self
    }

    fn todo_is(&self, todo: Todo) -> bool {
        self.next() == todo
    }

    fn see(&mut self, seen: Seen) {
        match (self.state, seen) {
            (State::Created | State::RequiresAction | State::Pending, seen) => match seen {
                Seen::Open => self.state = State::Created,
                Seen::RequiresAction => self.state = State::RequiresAction,
                Seen::Pending => self.state = State::Pending,
                Seen::Authorised => self.state = State::Authorised,
                Seen::Captured { amount, .. } => {
                    // Nobody has asked for that; the order comes first all the same.
                    self.captured = amount;
                    self.state = State::Authorised;
                }
                Seen::Voided => self.state = State::Voided,
                Seen::Declined(_) => self.state = State::Declined,
            },
            (
                State::Authorised | State::Revoking | State::Releasing,
                Seen::Captured { amount, .. },
            ) => self.captured = amount,
            // Should it be void by now: somebody may just be confirming, so the order comes first.
            // What is confirmed and cannot be captured is taken back.
            (State::Capturing, Seen::Captured { amount, .. }) if amount >= self.to_capture => {
                self.captured = amount;
                self.keep();
            }
            (State::Capturing, Seen::Voided | Seen::Declined(_)) => self.state = State::Revoking,
            (State::Releasing, Seen::Voided | Seen::Declined(_)) if self.captured == 0 => {
                self.state = State::Voided;
            }
            // Somebody else has gone on with what was over here: it may not keep the money.
            (State::Voided | State::Declined, Seen::Authorised) => self.state = State::Releasing,
            (State::Voided | State::Declined, Seen::Captured { amount, .. }) => {
                self.captured = amount;
                self.state = State::Releasing;
            }
            // What was taken beyond what was asked for goes back.
            (State::Captured, Seen::Captured { amount, .. }) if amount > self.captured => {
                self.refund_due += amount - self.captured;
                self.captured = amount;
            }
            _ => {}
        }
    }

    /// The money is not wanted.
    fn let_go(&mut self) {
        // What the gateway does not know of, nobody pays.
        self.state = if self.opened || self.captured > 0 {
            State::Releasing
        } else {
            State::Voided
        };
    }

    /// The money is ours; what the orders are not worth goes back.
    fn keep(&mut self) {
        self.state = State::Captured;
        self.refund_due = (self.captured - self.to_capture).max(0);
    }
}

/// What a buyer has to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = PaymentAction)]
pub struct Action {
    /// Where the buyer's browser goes, if anywhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redirect_url: Option<String>,
    /// What the gateway's own script in the browser needs, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_secret: Option<String>,
}

/// What is asked of a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Charge {
    /// Our name of it, from which every idempotency key is made.
    pub id: PaymentId,
    /// The gateway's name of it; `None` before it knows of it.
    pub reference: Option<String>,
    /// What the buyer shall pay.
    pub money: Money,
    /// What the buyer pays with: a token of the gateway, never a card's number.
    pub method: String,
    /// How often the gateway has definitely not done what it was asked for: each try has a key of
    /// its own, a lost answer has not.
    pub tries: u32,
}

impl Charge {
    /// The idempotency key of a step.
    pub fn key(&self, step: &str) -> String {
        format!("stockade-{}-{step}-{}", self.id, self.tries)
    }
}

#[cfg(test)]
mod tests;
