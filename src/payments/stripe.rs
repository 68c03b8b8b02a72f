//! Stripe: `PaymentIntents` with manual capture, over its HTTP API.

use futures::future::BoxFuture;
use reqwest::{Client, RequestBuilder, StatusCode, header::HeaderMap};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::{
    Answer, Found, Gateway, Invalid, Notice, Refund, Trouble, Unverified, agrees, is_ours,
    reference, verify,
    wire::{self, Reply, must, segment, text},
};
use crate::domain::payment::{Action, Charge, Decline, Seen};

/// The version of the API that answers are read by.
const VERSION: &str = "2024-06-20";
const SIGNATURE: &str = "stripe-signature";
/// The intent as it is, with what was given back.
const EXPAND: (&str, &str) = ("expand[]", "latest_charge");

/// How Stripe is reached.
#[derive(Clone, Debug)]
pub struct StripeSettings {
    /// `https://api.stripe.com`, or what plays it.
    pub url: String,
    /// `sk_…` or `rk_…`.
    pub secret_key: SecretString,
    /// `whsec_…`; two while it is changed.
    pub webhook_secrets: Vec<SecretString>,
    /// Where the buyer's browser comes back to.
    pub return_url: Option<String>,
}

/// Stripe.
#[derive(Debug)]
pub struct Stripe {
    settings: StripeSettings,
    client: Client,
}

impl Stripe {
    /// A client of it.
    ///
    /// # Errors
    /// When there is no TLS here.
    pub fn new(settings: StripeSettings) -> Result<Self, reqwest::Error> {
        Ok(Self {
            settings,
            client: wire::client()?,
        })
    }

    fn with_secret(&self, request: RequestBuilder) -> RequestBuilder {
        request
            .bearer_auth(self.settings.secret_key.expose_secret())
            .header("Stripe-Version", VERSION)
    }

    async fn post(&self, path: &str, key: &str, form: &[(&str, &str)]) -> Result<Reply, Trouble> {
        let url = format!("{}/v1/{path}", self.settings.url);
        let request = self.client.post(url).header("Idempotency-Key", key);
        wire::send(self.with_secret(request).form(form)).await
    }

    /// Does something with the intent, and reads what it is then.
    async fn step(
        &self,
        charge: &Charge,
        step: &str,
        form: &[(&str, &str)],
    ) -> Result<Found, Trouble> {
        let intent = segment(reference(charge)?)?;
        let path = format!("payment_intents/{intent}/{step}");
        let mut form = form.to_vec();
        form.push(EXPAND);
        let reply = self.post(&path, &charge.key(step), &form).await?;
        if reply.status.is_success() {
            return found(charge, &reply.body);
        }
        // A card that is declined comes as an error that has the intent inside.
        match reply.body.pointer("/error/payment_intent") {
            Some(intent) if reply.status == StatusCode::PAYMENT_REQUIRED => {
                let found = found(charge, intent)?;
                Ok(match found.seen {
                    Seen::Open => Seen::Declined(decline(&reply.body, "/error")).into(),
                    _ => found,
                })
            }
            _ => Err(refused(&reply)),
        }
    }
}

impl Gateway for Stripe {
    fn open<'a>(&'a self, charge: &'a Charge) -> Answer<'a, String> {
        Box::pin(async move {
            let amount = charge.money.amount.to_string();
            let currency = charge.money.currency.as_str().to_ascii_lowercase();
            let id = charge.id.to_string();
            // Without somewhere to come back to, only methods that need no redirection.
            let redirects = match self.settings.return_url {
                Some(_) => "always",
                None => "never",
            };
            let form = [
                ("amount", amount.as_str()),
                ("currency", &currency),
                ("capture_method", "manual"),
                ("automatic_payment_methods[enabled]", "true"),
                ("automatic_payment_methods[allow_redirects]", redirects),
                ("metadata[stockade_payment]", &id),
                EXPAND,
            ];
            let reply = self
                .post("payment_intents", &charge.key("open"), &form)
                .await?;
            if !reply.status.is_success() {
                return Err(refused(&reply));
            }
            found(charge, &reply.body)?;
            Ok(segment(must(&reply.body, "/id")?)?.to_owned())
        })
    }

    fn authorise<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(async move {
            let mut form = vec![("payment_method", charge.method.as_str())];
            if let Some(url) = &self.settings.return_url {
                form.push(("return_url", url));
            }
            self.step(charge, "confirm", &form).await
        })
    }

    fn look<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(async move {
            let intent = segment(reference(charge)?)?;
            let (name, value) = EXPAND;
            let url = format!(
                "{}/v1/payment_intents/{intent}?{name}={value}",
                self.settings.url
            );
            let request = self.with_secret(self.client.get(url));
            let reply = wire::send(request).await?;
            if reply.status.is_success() {
                found(charge, &reply.body)
            } else {
                Err(refused(&reply))
            }
        })
    }

    fn capture<'a>(&'a self, charge: &'a Charge, amount: i64) -> Answer<'a, Found> {
        Box::pin(async move {
            let amount = amount.to_string();
            self.step(charge, "capture", &[("amount_to_capture", &amount)])
                .await
        })
    }

    fn void<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(async move {
            let reason = ("cancellation_reason", "abandoned");
            self.step(charge, "cancel", &[reason]).await
        })
    }

    fn refund<'a>(&'a self, charge: &'a Charge, refund: &'a Refund) -> Answer<'a, ()> {
        Box::pin(async move {
            let amount = refund.amount.to_string();
            let intent = reference(charge)?;
            let form = [("payment_intent", intent), ("amount", &amount)];
            let reply = self.post("refunds", &refund.key, &form).await?;
            if !reply.status.is_success() {
                return Err(refused(&reply));
            }
            let body = &reply.body;
            let currency = must(body, "/currency")?;
            let same = currency.eq_ignore_ascii_case(charge.money.currency.as_str())
                && body["amount"].as_i64() == Some(refund.amount)
                && text(body, "/payment_intent") == Some(intent);
            if !same {
                let what = "the refund is of another amount, currency or payment";
                return Err(Trouble::Disagrees(what.to_owned()));
            }
            match must(body, "/status")? {
                // On its way to the bank, which takes days; if it fails there, the money is back
                // on the merchant's account, and the operator hears of it from Stripe.
                "succeeded" | "pending" | "requires_action" => Ok(()),
                other => Err(Trouble::Refused(format!("the refund is {other}"))),
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
            verify(&self.settings.webhook_secrets, header, body, now)
                .map_err(Unverified::Forged)?;
            notice(body)
        })
    }
}

/// An event that is known to be Stripe's. The object of most is an intent; a charge, a refund and a
/// dispute name theirs.
pub(super) fn notice(body: &[u8]) -> Result<Notice, Unverified> {
    let unreadable = |what: &str| Unverified::Unreadable(what.to_owned());
    let event: Value =
        serde_json::from_slice(body).map_err(|error| unreadable(&error.to_string()))?;
    let member = |path| text(&event, path).filter(|text| (1..=255).contains(&text.len()));
    let reference = match member("/data/object/object") {
        Some("payment_intent") => member("/data/object/id"),
        _ => member("/data/object/payment_intent"),
    };
    Ok(Notice {
        id: member("/id").ok_or_else(|| unreadable("no id"))?.to_owned(),
        kind: member("/type")
            .ok_or_else(|| unreadable("no type"))?
            .to_owned(),
        reference: reference.map(str::to_owned),
    })
}

/// What an intent says, once it is known to be this payment's.
fn found(charge: &Charge, intent: &Value) -> Result<Found, Trouble> {
    let amount = intent["amount"]
        .as_i64()
        .ok_or_else(|| Trouble::Unknown("the answer has no amount".to_owned()))?;
    agrees(
        charge,
        must(intent, "/id")?,
        (amount, must(intent, "/currency")?),
    )?;
    is_ours(charge, text(intent, "/metadata/stockade_payment"))?;
    let seen = match must(intent, "/status")? {
        "requires_payment_method" if intent["last_payment_error"].is_object() => {
            Seen::Declined(decline(intent, "/last_payment_error"))
        }
        "requires_payment_method" | "requires_confirmation" => Seen::Open,
        "requires_action" => Seen::RequiresAction,
        "processing" => Seen::Pending,
        "requires_capture" => match intent["amount_capturable"].as_i64() {
            Some(reserved) if reserved != amount => {
                let what = format!("asked for {amount}, reserved {reserved}");
                return Err(Trouble::Disagrees(what));
            }
            _ => Seen::Authorised,
        },
        "succeeded" => Seen::Captured {
            amount: intent["amount_received"].as_i64().unwrap_or(amount),
            refunded: intent
                .pointer("/latest_charge/amount_refunded")
                .and_then(Value::as_i64)
                .unwrap_or(0),
        },
        "canceled" => Seen::Voided,
        other => return Err(Trouble::Unknown(format!("status {other}"))),
    };
    let action = (seen == Seen::RequiresAction).then(|| Action {
        redirect_url: text(intent, "/next_action/redirect_to_url/url").map(str::to_owned),
        client_secret: text(intent, "/client_secret").map(str::to_owned),
    });
    Ok(Found { seen, action })
}

/// Why a card was declined, from the error at `path`.
fn decline(body: &Value, path: &str) -> Decline {
    let code = text(body, &format!("{path}/decline_code"))
        .filter(|code| *code != "generic_decline")
        .or_else(|| text(body, &format!("{path}/code")));
    match code.unwrap_or_default() {
        "insufficient_funds" => Decline::InsufficientFunds,
        "expired_card" => Decline::ExpiredCard,
        "incorrect_number"
        | "invalid_number"
        | "incorrect_cvc"
        | "invalid_cvc"
        | "invalid_account"
        | "invalid_expiry_month"
        | "invalid_expiry_year"
        | "card_not_supported"
        | "currency_not_supported"
        | "incorrect_zip" => Decline::InvalidMethod,
        "authentication_required" | "payment_intent_authentication_failure" => {
            Decline::AuthenticationFailed
        }
        "card_velocity_exceeded" | "withdrawal_count_limit_exceeded" => Decline::LimitExceeded,
        _ => Decline::Declined,
    }
}

/// A definite no. What Stripe says about it is for the operator.
fn refused(reply: &Reply) -> Trouble {
    if let Some(trouble) = wire::not_let_in(reply) {
        return trouble;
    }
    let error = |member| text(&reply.body, &format!("/error/{member}")).unwrap_or("-");
    Trouble::Refused(format!(
        "status {}, {} {}: {}",
        reply.status.as_u16(),
        error("type"),
        error("code"),
        error("message")
    ))
}
