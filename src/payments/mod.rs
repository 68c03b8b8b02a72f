//! Gateways: who reserves, takes and gives back money, each behind one trait and a circuit breaker.
//!
//! A gateway answers what it has of a payment now, and every answer is compared with what was asked
//! for. What did not answer may have happened: it is never taken for a refusal.

mod breaker;
mod paypal;
mod sandbox;
mod signature;
mod stripe;
mod wire;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use reqwest::header::HeaderMap;

pub use self::{
    breaker::{Breaker, Guarded},
    paypal::{Paypal, PaypalSettings},
    sandbox::{Sandbox, methods},
    signature::{Invalid, SIGNATURE_TOLERANCE_SECONDS, sign, verify},
    stripe::{Stripe, StripeSettings},
};
use crate::domain::{
    id::PaymentId,
    money::Money,
    payment::{self, Action, Charge, Seen},
};

/// How long a gateway may take to be reached.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// How long a call may take.
const CALL_MAX: Duration = Duration::from_secs(6);
/// Bytes of an answer: a payment has a few thousand.
const ANSWER_BYTES_MAX: usize = 256 * 1024;

/// What a gateway has of a payment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// How far it has come there.
    pub seen: Seen,
    /// What the buyer has to do, if anything.
    pub action: Option<Action>,
}

impl From<Seen> for Found {
    fn from(seen: Seen) -> Self {
        Self { seen, action: None }
    }
}

/// Money to give back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refund {
    /// One key, one refund, however often it is sent.
    pub key: String,
    /// Minor units, above zero.
    pub amount: i64,
}

/// Why a call came to nothing that is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// No answer, or none that can be read: it may have happened.
    #[error("no answer: {0}")]
    Unknown(String),
    /// It was not sent, or not taken: nothing happened.
    #[error("not available: {reason}")]
    Unavailable {
        /// Why.
        reason: String,
        /// When it may be tried again.
        after: Duration,
    },
    /// The gateway has not done it, and says so.
    #[error("refused: {0}")]
    Refused(String),
    /// The answer is about another amount, currency or payment.
    #[error("the gateway disagrees: {0}")]
    Disagrees(String),
}

/// What a webhook is about. Only that it is time to ask is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The gateway's name of the event: one that comes twice is one.
    pub id: String,
    /// What happened, in the gateway's words.
    pub kind: String,
    /// The gateway's name of the payment, if it is about one.
    pub reference: Option<String>,
}

/// Why a webhook was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unverified {
    /// It does not come from the gateway, or is too old.
    #[error("{0}")]
    Forged(Invalid),
    /// It is signed and cannot be read.
    #[error("not an event: {0}")]
    Unreadable(String),
    /// The gateway, which has to be asked, does not answer.
    #[error("cannot be verified at the moment: {0}")]
    Later(String),
}

/// What answers a call to a gateway.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, Trouble>>;

/// Somebody who moves money. Every call may be repeated: what has happened once is told again.
pub trait Gateway: fmt::Debug + Send + Sync {
    /// Makes the payment known, and gives the gateway's name of it. Nobody pays yet.
    fn open<'a>(&'a self, charge: &'a Charge) -> Answer<'a, String>;
    /// Has the whole amount reserved.
    fn authorise<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found>;
    /// What it has of the payment now.
    fn look<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found>;
    /// Takes so much of what is reserved, and lets the rest go.
    fn capture<'a>(&'a self, charge: &'a Charge, amount: i64) -> Answer<'a, Found>;
    /// Lets go of what is reserved, and has nobody pay later.
    fn void<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found>;
    /// Gives back some of what was taken.
    fn refund<'a>(&'a self, charge: &'a Charge, refund: &'a Refund) -> Answer<'a, ()>;
    /// Reads a webhook, once it is sure whose it is. `now` in seconds since the Unix epoch.
    fn webhook<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a [u8],
        now: i64,
    ) -> BoxFuture<'a, Result<Notice, Unverified>>;
}

/// The gateways that are configured.
#[derive(Clone, Debug, Default)]
pub struct Gateways(BTreeMap<payment::Gateway, Arc<Guarded>>);

impl Gateways {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more, behind a breaker of its own.
    pub fn add(&mut self, name: payment::Gateway, gateway: Arc<dyn Gateway>) {
        self.0.insert(name, Arc::new(Guarded::new(gateway)));
    }

    /// The gateway with this name, if it is configured.
    pub fn of(&self, name: payment::Gateway) -> Option<&Arc<Guarded>> {
        self.0.get(&name)
    }
}

/// Checks that an answer is about this payment and all of its money.
fn agrees(charge: &Charge, reference: &str, money: (i64, &str)) -> Result<(), Trouble> {
    if let Some(known) = &charge.reference
        && known != reference
    {
        let what = format!("asked for {known}, answered about {reference}");
        return Err(Trouble::Disagrees(what));
    }
    let Money { amount, currency } = charge.money;
    if money.0 != amount || !money.1.eq_ignore_ascii_case(currency.as_str()) {
        let what = format!(
            "asked for {amount} {}, answered about {} {}",
            currency.as_str(),
            money.0,
            money.1
        );
        return Err(Trouble::Disagrees(what));
    }
    Ok(())
}

/// The gateway's name of a payment that must have one by now.
fn reference(charge: &Charge) -> Result<&str, Trouble> {
    charge
        .reference
        .as_deref()
        .ok_or_else(|| Trouble::Refused(format!("payment {} has no name there yet", charge.id)))
}

/// Whether the gateway's note of our name is the one of this payment.
fn is_ours(charge: &Charge, noted: Option<&str>) -> Result<(), Trouble> {
    let PaymentId(id) = charge.id;
    match noted {
        Some(noted) if noted == id.to_string() => Ok(()),
        noted => Err(Trouble::Disagrees(format!(
            "asked for payment {id}, answered about {}",
            noted.unwrap_or("none of ours")
        ))),
    }
}
