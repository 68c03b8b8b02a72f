//! A bank with toy money: it declines, dawdles, asks, loses answers and repeats itself, as it is told
//! by magic words in the place of a payment method. `docs/PAYMENTS.md` lists them.

use std::time::Duration;

use futures::future::BoxFuture;
use reqwest::header::{HeaderMap, HeaderValue};
use secrecy::SecretString;
use serde_json::json;

use super::{
    Answer, Found, Gateway, Invalid, Notice, Refund, Trouble, Unverified, agrees, reference, sign,
    stripe::notice, verify,
};
use crate::{
    clock,
    domain::payment::{Action, Charge, Decline, Seen},
    store::{
        StoreError,
        sandbox::{ToyBank, ToyChange, ToyCharge, ToyNotice},
    },
};

/// The magic words.
pub mod methods {
    /// It works.
    pub const OK: &str = "sandbox_ok";
    /// Not enough money.
    pub const INSUFFICIENT_FUNDS: &str = "sandbox_insufficient_funds";
    /// An old card.
    pub const EXPIRED_CARD: &str = "sandbox_expired_card";
    /// No reason given.
    pub const DECLINED: &str = "sandbox_declined";
    /// It works, and takes a second and a half for each step.
    pub const SLOW: &str = "sandbox_slow";
    /// The buyer has to say yes or no.
    pub const REQUIRES_ACTION: &str = "sandbox_requires_action";
    /// It thinks for a second, then says yes.
    pub const PENDING: &str = "sandbox_pending";
    /// It thinks for a second, then says no.
    pub const PENDING_DECLINED: &str = "sandbox_pending_declined";
    /// It works, and every webhook comes three times, late.
    pub const NOISY: &str = "sandbox_noisy";
    /// The money is reserved, and the answer is lost.
    pub const LOST_ANSWER: &str = "sandbox_lost_answer";
    /// The money is taken, and the answer is lost.
    pub const LOST_CAPTURE: &str = "sandbox_lost_capture";
    /// The money is taken at once, without waiting to be told.
    pub const CAPTURES_AT_ONCE: &str = "sandbox_captures_at_once";
    /// The money is reserved, and gone when it is to be taken.
    pub const CAPTURE_FAILS: &str = "sandbox_capture_fails";
    /// Every answer is about another amount.
    pub const WRONG_AMOUNT: &str = "sandbox_wrong_amount";
    /// The bank is closed.
    pub const OUTAGE: &str = "sandbox_outage";

    /// All of them.
    pub const ALL: [&str; 15] = [
        OK,
        INSUFFICIENT_FUNDS,
        EXPIRED_CARD,
        DECLINED,
        SLOW,
        REQUIRES_ACTION,
        PENDING,
        PENDING_DECLINED,
        NOISY,
        LOST_ANSWER,
        LOST_CAPTURE,
        CAPTURES_AT_ONCE,
        CAPTURE_FAILS,
        WRONG_AMOUNT,
        OUTAGE,
    ];
}

/// The header of its webhooks.
const SIGNATURE: &str = "sandbox-signature";
/// How long a slow step takes.
const SLOWNESS: Duration = Duration::from_millis(1_500);
/// How long a pending payment is.
const RIPENING: Duration = Duration::from_secs(1);
/// How late webhooks are that are late.
const LATE: Duration = Duration::from_millis(700);
/// The states in which nothing is taken, and something could be.
const NOT_TAKEN: &[&str] = &["open", "requires_action", "pending", "authorised"];

/// The sandbox.
#[derive(Debug)]
pub struct Sandbox {
    bank: ToyBank,
    secret: [SecretString; 1],
}

impl Sandbox {
    /// One whose books are there, and which signs its webhooks with `secret`.
    pub fn new(bank: ToyBank, secret: SecretString) -> Self {
        Self {
            bank,
            secret: [secret],
        }
    }

    /// A buyer's answer to a payment that asks for one. `false` when nothing is asked (any more).
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn decide(&self, reference: &str, yes: bool) -> Result<bool, StoreError> {
        let change = if yes {
            change(&["requires_action"], "authorised", None, "authorised")
        } else {
            let why = Some(Decline::AuthenticationFailed);
            change(&["requires_action"], "declined", why, "declined")
        };
        self.bank.change(reference.to_owned(), change).await
    }

    /// Webhooks that are to be sent now, each signed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn webhooks(&self, limit: i64) -> Result<Vec<(HeaderMap, Vec<u8>)>, StoreError> {
        let notices = self.bank.notices(limit).await?;
        Ok(notices.iter().map(|notice| self.signed(notice)).collect())
    }

    fn signed(&self, notice: &ToyNotice) -> (HeaderMap, Vec<u8>) {
        let body = json!({
            "id": format!("evt_{}", notice.event.simple()),
            "object": "event",
            "type": notice.kind,
            "data": { "object": { "object": "payment_intent", "id": notice.reference } },
        })
        .to_string()
        .into_bytes();
        let mut headers = HeaderMap::new();
        let [secret] = &self.secret;
        // Digits and letters are always a header's value.
        if let Ok(value) = HeaderValue::try_from(sign(secret, &body, clock::now().timestamp())) {
            headers.insert(SIGNATURE, value);
        }
        (headers, body)
    }

    async fn charge(&self, charge: &Charge) -> Result<ToyCharge, Trouble> {
        let name = reference(charge)?.to_owned();
        let found = self.bank.charge(name.clone()).await.map_err(trouble)?;
        let found = found.ok_or_else(|| Trouble::Refused(format!("no payment {name}")))?;
        let wrong = found.method.as_deref() == Some(methods::WRONG_AMOUNT);
        let amount = found.money.amount + i64::from(wrong);
        agrees(
            charge,
            &found.reference,
            (amount, found.money.currency.as_str()),
        )?;
        Ok(found)
    }

    /// What has become of a charge; a pending one whose time has come is decided now.
    async fn present(&self, charge: &Charge) -> Result<Found, Trouble> {
        let mut found = self.charge(charge).await?;
        if found.state == "pending" && found.ripe {
            let change = if found.method.as_deref() == Some(methods::PENDING_DECLINED) {
                change(
                    &["pending"],
                    "declined",
                    Some(Decline::Declined),
                    "declined",
                )
            } else {
                change(&["pending"], "authorised", None, "authorised")
            };
            self.change(charge, change).await?;
            found = self.charge(charge).await?;
        }
        Ok(seen(&found))
    }

    async fn change(&self, charge: &Charge, change: ToyChange) -> Result<bool, Trouble> {
        let name = reference(charge)?.to_owned();
        self.bank.change(name, change).await.map_err(trouble)
    }

    /// Whether the answer to this is lost on purpose: the first one only.
    async fn loses(&self, charge: &Charge, word: &str) -> Result<(), Trouble> {
        if charge.method == word
            && self
                .bank
                .lose(reference(charge)?.to_owned())
                .await
                .map_err(trouble)?
        {
            return Err(Trouble::Unknown(
                "the answer was lost on purpose".to_owned(),
            ));
        }
        Ok(())
    }

    async fn slowly(&self, charge: &Charge) {
        if charge.method == methods::SLOW {
            tokio::time::sleep(SLOWNESS).await;
        }
    }
}

/// A change that nothing is taken by, with the webhook that tells of it.
fn change(
    from: &'static [&'static str],
    state: &'static str,
    decline: Option<Decline>,
    kind: &'static str,
) -> ToyChange {
    ToyChange {
        from,
        state,
        method: None,
        decline,
        captured: 0,
        ripe_in: None,
        notices: vec![(kind, Duration::ZERO, 1)],
    }
}

/// What a charge says of itself.
fn seen(charge: &ToyCharge) -> Found {
    let seen = match charge.state.as_str() {
        "open" => Seen::Open,
        "requires_action" => Seen::RequiresAction,
        "pending" => Seen::Pending,
        "authorised" => Seen::Authorised,
        "captured" => Seen::Captured {
            amount: charge.captured,
            refunded: charge.refunded,
        },
        "declined" => Seen::Declined(charge.decline.unwrap_or(Decline::Declined)),
        // The table knows no other word.
        _ => Seen::Voided,
    };
    let action = (seen == Seen::RequiresAction).then(|| Action {
        redirect_url: Some(format!("/v1/sandbox/{}", charge.reference)),
        client_secret: None,
    });
    Found { seen, action }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what `map_err` calls")]
fn trouble(error: StoreError) -> Trouble {
    Trouble::Unknown(error.to_string())
}

impl Gateway for Sandbox {
    fn open<'a>(&'a self, charge: &'a Charge) -> Answer<'a, String> {
        Box::pin(async move {
            if charge.method == methods::OUTAGE {
                return Err(Trouble::Unavailable {
                    reason: "the sandbox is closed".to_owned(),
                    after: Duration::from_secs(1),
                });
            }
            let name = format!("toy_{}", charge.id.0.simple());
            self.bank
                .open(charge.id, charge.money, name)
                .await
                .map_err(trouble)
        })
    }

    fn authorise<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(async move {
            self.slowly(charge).await;
            let method = charge.method.as_str();
            let decline = match method {
                methods::INSUFFICIENT_FUNDS => Some(Decline::InsufficientFunds),
                methods::EXPIRED_CARD => Some(Decline::ExpiredCard),
                methods::DECLINED => Some(Decline::Declined),
                known if methods::ALL.contains(&known) => None,
                _ => Some(Decline::InvalidMethod),
            };
            let (state, kind) = match method {
                _ if decline.is_some() => ("declined", "declined"),
                methods::REQUIRES_ACTION => ("requires_action", "requires_action"),
                methods::PENDING | methods::PENDING_DECLINED => ("pending", "pending"),
                methods::CAPTURES_AT_ONCE => ("captured", "captured"),
                _ => ("authorised", "authorised"),
            };
            let mut to = ToyChange {
                method: Some(method.to_owned()),
                ..change(&["open"], state, decline, kind)
            };
            if state == "captured" {
                to.captured = charge.money.amount;
            }
            if state == "pending" {
                to.ripe_in = Some(RIPENING);
                to.notices.push(("ripe", RIPENING, 1));
            }
            if method == methods::NOISY {
                to.notices = vec![(kind, LATE, 3)];
            }
            self.change(charge, to).await?;
            self.loses(charge, methods::LOST_ANSWER).await?;
            self.present(charge).await
        })
    }

    fn look<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(self.present(charge))
    }

    fn capture<'a>(&'a self, charge: &'a Charge, amount: i64) -> Answer<'a, Found> {
        Box::pin(async move {
            self.slowly(charge).await;
            let mut to = change(&["authorised"], "captured", None, "captured");
            to.captured = amount;
            if charge.method == methods::CAPTURE_FAILS {
                let lapsed = Some(Decline::Lapsed);
                to = change(&["authorised"], "declined", lapsed, "declined");
            }
            if charge.method == methods::NOISY {
                // The later one first, and each three times.
                to.notices = vec![("captured", Duration::ZERO, 3), ("captured", 2 * LATE, 3)];
            }
            self.change(charge, to).await?;
            self.loses(charge, methods::LOST_CAPTURE).await?;
            self.present(charge).await
        })
    }

    fn void<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(async move {
            self.change(charge, change(NOT_TAKEN, "voided", None, "voided"))
                .await?;
            self.present(charge).await
        })
    }

    fn refund<'a>(&'a self, charge: &'a Charge, refund: &'a Refund) -> Answer<'a, ()> {
        Box::pin(async move {
            let name = reference(charge)?.to_owned();
            let Refund { key, amount } = refund.clone();
            let done = self.bank.refund(name, key, amount).await.map_err(trouble)?;
            if done {
                Ok(())
            } else {
                Err(Trouble::Refused(
                    "there is not so much to give back".to_owned(),
                ))
            }
        })
    }

    fn webhook<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a [u8],
        now: i64,
    ) -> BoxFuture<'a, Result<Notice, Unverified>> {
        Box::pin(async move {
            let header = headers.get(SIGNATURE).and_then(|value| value.to_str().ok());
            let header = header.ok_or(Unverified::Forged(Invalid::Missing))?;
            verify(&self.secret, header, body, now).map_err(Unverified::Forged)?;
            notice(body)
        })
    }
}
