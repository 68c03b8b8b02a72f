//! PayPal: Orders v2 with the intent AUTHORIZE, over its HTTP API.
//!
//! The buyer approves at PayPal first; only then the money can be reserved.

use std::time::Duration;

use futures::future::BoxFuture;
use reqwest::{Client, RequestBuilder, StatusCode, header::HeaderMap};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use tokio::{sync::Mutex, time::Instant};

use super::{
    Answer, Found, Gateway, Invalid, Notice, Refund, Trouble, Unverified, agrees, is_ours,
    reference,
    wire::{self, Reply, must, segment, text},
};
use crate::domain::{
    money::{Currency, Money},
    payment::{Action, Charge, Decline, Seen},
};

/// A token is not used any more so long before its end.
const TOKEN_MARGIN: Duration = Duration::from_mins(1);
/// The longest that a token is believed to live.
const TOKEN_LIFE_MAX: Duration = Duration::from_hours(8);
/// What a webhook must have to be verified, in PayPal's names.
const TRANSMISSION: [(&str, &str); 5] = [
    ("auth_algo", "paypal-auth-algo"),
    ("cert_url", "paypal-cert-url"),
    ("transmission_id", "paypal-transmission-id"),
    ("transmission_sig", "paypal-transmission-sig"),
    ("transmission_time", "paypal-transmission-time"),
];

/// How PayPal is reached.
#[derive(Clone, Debug)]
pub struct PaypalSettings {
    /// `https://api-m.paypal.com`, or what plays it.
    pub url: String,
    /// The application.
    pub client_id: String,
    /// Its secret.
    pub client_secret: SecretString,
    /// PayPal's name of our webhook.
    pub webhook_id: String,
    /// Where the buyer's browser comes back to.
    pub return_url: Option<String>,
}

/// PayPal.
#[derive(Debug)]
pub struct Paypal {
    settings: PaypalSettings,
    client: Client,
    token: Mutex<Option<(SecretString, Instant)>>,
}

impl Paypal {
    /// A client of it.
    ///
    /// # Errors
    /// When there is no TLS here.
    pub fn new(settings: PaypalSettings) -> Result<Self, reqwest::Error> {
        Ok(Self {
            settings,
            client: wire::client()?,
            token: Mutex::new(None),
        })
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.settings.url)
    }

    /// An access token; one that is known is used until shortly before its end.
    async fn token(&self) -> Result<SecretString, Trouble> {
        let mut known = self.token.lock().await;
        if let Some((token, end)) = &*known
            && Instant::now() < *end
        {
            return Ok(token.clone());
        }
        let request = self
            .client
            .post(self.url("/v1/oauth2/token"))
            .basic_auth(
                &self.settings.client_id,
                Some(self.settings.client_secret.expose_secret()),
            )
            .form(&[("grant_type", "client_credentials")]);
        // Nothing moves by this: whatever went wrong, the payment has not happened.
        let reply = wire::send(request)
            .await
            .map_err(|error| Trouble::Unavailable {
                reason: error.to_string(),
                after: Duration::from_secs(1),
            })?;
        if !reply.status.is_success() {
            return Err(refused(&reply));
        }
        let token = SecretString::from(must(&reply.body, "/access_token")?);
        let seconds = reply.body["expires_in"].as_u64().unwrap_or(0);
        let life = Duration::from_secs(seconds).min(TOKEN_LIFE_MAX);
        let end = Instant::now() + life.saturating_sub(TOKEN_MARGIN);
        *known = Some((token.clone(), end));
        Ok(token)
    }

    async fn send(&self, request: RequestBuilder) -> Result<Reply, Trouble> {
        let token = self.token().await?;
        let reply = wire::send(request.bearer_auth(token.expose_secret())).await?;
        if reply.status == StatusCode::UNAUTHORIZED {
            // It ended early; the next call gets another.
            *self.token.lock().await = None;
        }
        Ok(reply)
    }

    async fn post(&self, path: &str, key: &str, body: &Value) -> Result<Reply, Trouble> {
        let request = self.client.post(self.url(path)).json(body);
        let request = request
            .header("PayPal-Request-Id", key)
            .header("Prefer", "return=representation");
        self.send(request).await
    }

    /// The order as it is, known to be this payment's.
    async fn order(&self, charge: &Charge) -> Result<Value, Trouble> {
        let order = segment(reference(charge)?)?;
        let url = self.url(&format!("/v2/checkout/orders/{order}"));
        let reply = self.send(self.client.get(url)).await?;
        if !reply.status.is_success() {
            return Err(refused(&reply));
        }
        check(charge, &reply.body)?;
        Ok(reply.body)
    }
}

impl Gateway for Paypal {
    fn open<'a>(&'a self, charge: &'a Charge) -> Answer<'a, String> {
        Box::pin(async move {
            let mut body = json!({
                "intent": "AUTHORIZE",
                "purchase_units": [{
                    "reference_id": "default",
                    "custom_id": charge.id.to_string(),
                    "amount": amount(charge.money)?,
                }],
            });
            if let Some(url) = &self.settings.return_url {
                body["payment_source"] = json!({ "paypal": { "experience_context": {
                    "return_url": url, "cancel_url": url, "user_action": "PAY_NOW",
                    "shipping_preference": "NO_SHIPPING",
                } } });
            }
            let reply = self
                .post("/v2/checkout/orders", &charge.key("open"), &body)
                .await?;
            if !reply.status.is_success() {
                return Err(refused(&reply));
            }
            check(charge, &reply.body)?;
            Ok(segment(must(&reply.body, "/id")?)?.to_owned())
        })
    }

    fn authorise<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(async move {
            let order = self.order(charge).await?;
            let found = found(charge, &order)?;
            if found.seen != Seen::Open {
                // The buyer has not approved yet, or it is reserved already.
                return Ok(found);
            }
            let path = format!(
                "/v2/checkout/orders/{}/authorize",
                segment(reference(charge)?)?
            );
            let reply = self
                .post(&path, &charge.key("authorize"), &json!({}))
                .await?;
            if reply.status.is_success() {
                check(charge, &reply.body)?;
                return self::found(charge, &reply.body);
            }
            match decline(&reply.body) {
                Some(why) => Ok(Seen::Declined(why).into()),
                None => Err(refused(&reply)),
            }
        })
    }

    fn look<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(async move { found(charge, &self.order(charge).await?) })
    }

    fn capture<'a>(&'a self, charge: &'a Charge, minor: i64) -> Answer<'a, Found> {
        Box::pin(async move {
            let order = self.order(charge).await?;
            let found = found(charge, &order)?;
            let authorization = text(&order, AUTHORIZATION);
            let (Seen::Authorised, Some(authorization)) = (found.seen, authorization) else {
                return Ok(found);
            };
            let path = format!(
                "/v2/payments/authorizations/{}/capture",
                segment(authorization)?
            );
            let money = Money {
                amount: minor,
                ..charge.money
            };
            let body = json!({ "amount": amount(money)?, "final_capture": true });
            let reply = self.post(&path, &charge.key("capture"), &body).await?;
            match decline(&reply.body) {
                Some(why) => return Ok(Seen::Declined(why).into()),
                None if !reply.status.is_success() => return Err(refused(&reply)),
                None => {}
            }
            self::found(charge, &self.order(charge).await?)
        })
    }

    fn void<'a>(&'a self, charge: &'a Charge) -> Answer<'a, Found> {
        Box::pin(async move {
            let order = self.order(charge).await?;
            let found = found(charge, &order)?;
            match (found.seen, text(&order, AUTHORIZATION)) {
                (Seen::Authorised | Seen::Pending, Some(authorization)) => {
                    let path = format!(
                        "/v2/payments/authorizations/{}/void",
                        segment(authorization)?
                    );
                    let reply = self.post(&path, &charge.key("void"), &json!({})).await?;
                    if !reply.status.is_success() {
                        return Err(refused(&reply));
                    }
                    self::found(charge, &self.order(charge).await?)
                }
                // Approved or not, nobody but us could reserve anything of it.
                (Seen::Open | Seen::RequiresAction, _) => Ok(Seen::Voided.into()),
                _ => Ok(found),
            }
        })
    }

    fn refund<'a>(&'a self, charge: &'a Charge, refund: &'a Refund) -> Answer<'a, ()> {
        Box::pin(async move {
            let order = self.order(charge).await?;
            let capture = must(&order, CAPTURE)?;
            let path = format!("/v2/payments/captures/{}/refund", segment(capture)?);
            let money = Money {
                amount: refund.amount,
                ..charge.money
            };
            let body = json!({ "amount": amount(money)? });
            let reply = self.post(&path, &refund.key, &body).await?;
            if !reply.status.is_success() {
                return Err(refused(&reply));
            }
            if minor(&reply.body["amount"], money.currency)? != refund.amount {
                return Err(Trouble::Disagrees(
                    "the refund is of another amount".to_owned(),
                ));
            }
            match must(&reply.body, "/status")? {
                "COMPLETED" | "PENDING" => Ok(()),
                other => Err(Trouble::Refused(format!("the refund is {other}"))),
            }
        })
    }

    /// PayPal is asked whether it sent this: its signatures need its certificates.
    fn webhook<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a [u8],
        _now: i64,
    ) -> BoxFuture<'a, Result<Notice, Unverified>> {
        Box::pin(async move {
            let unreadable = |what: &str| Unverified::Unreadable(what.to_owned());
            let event: Value =
                serde_json::from_slice(body).map_err(|error| unreadable(&error.to_string()))?;
            let body = str::from_utf8(body).map_err(|error| unreadable(&error.to_string()))?;
            let mut question = json!({ "webhook_id": self.settings.webhook_id });
            for (member, header) in TRANSMISSION {
                let value = headers.get(header).and_then(|value| value.to_str().ok());
                let value = value.ok_or(Unverified::Forged(Invalid::Missing))?;
                question[member] = value.into();
            }
            // The event goes along byte by byte as it came, or the signature is not of it.
            let question = question.to_string();
            let question = question.trim_end_matches('}');
            let question = format!("{question},\"webhook_event\":{body}}}");
            let request = self
                .client
                .post(self.url("/v1/notifications/verify-webhook-signature"))
                .header("Content-Type", "application/json")
                .body(question);
            let later = |trouble: Trouble| Unverified::Later(trouble.to_string());
            let reply = self.send(request).await.map_err(later)?;
            match text(&reply.body, "/verification_status") {
                Some("SUCCESS") if reply.status.is_success() => {}
                Some(_) if reply.status.is_success() => {
                    return Err(Unverified::Forged(Invalid::Wrong));
                }
                _ => return Err(later(refused(&reply))),
            }
            let member = |path| text(&event, path).filter(|text| (1..=255).contains(&text.len()));
            let kind = member("/event_type").ok_or_else(|| unreadable("no event_type"))?;
            let reference = if kind.starts_with("CHECKOUT.ORDER.") {
                member("/resource/id")
            } else {
                member("/resource/supplementary_data/related_ids/order_id")
            };
            Ok(Notice {
                id: member("/id").ok_or_else(|| unreadable("no id"))?.to_owned(),
                kind: kind.to_owned(),
                reference: reference.map(str::to_owned),
            })
        })
    }
}

const PAYMENTS: &str = "/purchase_units/0/payments";
const AUTHORIZATION: &str = "/purchase_units/0/payments/authorizations/0/id";
const CAPTURE: &str = "/purchase_units/0/payments/captures/0/id";

/// Checks that an order is of this payment and all of its money.
fn check(charge: &Charge, order: &Value) -> Result<(), Trouble> {
    let asked = &order["purchase_units"][0]["amount"];
    let found = minor(asked, charge.money.currency)?;
    let currency = charge.money.currency.as_str();
    agrees(charge, must(order, "/id")?, (found, currency))?;
    is_ours(charge, text(order, "/purchase_units/0/custom_id"))
}

/// What an order says.
fn found(charge: &Charge, order: &Value) -> Result<Found, Trouble> {
    let currency = charge.money.currency;
    let list = |name: &str| {
        let list = order.pointer(&format!("{PAYMENTS}/{name}"));
        list.and_then(Value::as_array).cloned().unwrap_or_default()
    };
    let sum = |items: &[Value], statuses: &[&str]| -> Result<i64, Trouble> {
        let counts =
            |item: &&Value| text(item, "/status").is_some_and(|status| statuses.contains(&status));
        items
            .iter()
            .filter(counts)
            .map(|item| minor(&item["amount"], currency))
            .sum()
    };
    let captured = sum(
        &list("captures"),
        &["COMPLETED", "PENDING", "PARTIALLY_REFUNDED", "REFUNDED"],
    )?;
    if captured > 0 {
        let refunded = sum(&list("refunds"), &["COMPLETED", "PENDING"])?;
        return Ok(Seen::Captured {
            amount: captured,
            refunded,
        }
        .into());
    }
    if let Some(authorization) = list("authorizations").first() {
        let reserved = minor(&authorization["amount"], currency)?;
        return Ok(match must(authorization, "/status")? {
            "CREATED" if reserved == charge.money.amount => Seen::Authorised,
            "CREATED" => {
                let what = format!("asked for {}, reserved {reserved}", charge.money.amount);
                return Err(Trouble::Disagrees(what));
            }
            "PENDING" => Seen::Pending,
            "VOIDED" => Seen::Voided,
            "EXPIRED" => Seen::Declined(Decline::Lapsed),
            "DENIED" => Seen::Declined(Decline::Declined),
            other => return Err(Trouble::Unknown(format!("authorization {other}"))),
        }
        .into());
    }
    Ok(match must(order, "/status")? {
        "CREATED" | "PAYER_ACTION_REQUIRED" => Found {
            seen: Seen::RequiresAction,
            action: Some(Action {
                redirect_url: approval(order),
                client_secret: None,
            }),
        },
        "APPROVED" | "SAVED" => Seen::Open.into(),
        "VOIDED" => Seen::Voided.into(),
        other => return Err(Trouble::Unknown(format!("order {other}"))),
    })
}

/// Where the buyer approves.
fn approval(order: &Value) -> Option<String> {
    let links = order["links"].as_array()?;
    let link = links
        .iter()
        .find(|link| matches!(text(link, "/rel"), Some("payer-action" | "approve")))?;
    text(link, "/href").map(str::to_owned)
}

/// Why the bank said no, if it did.
fn decline(body: &Value) -> Option<Decline> {
    match text(body, "/details/0/issue")? {
        "INSTRUMENT_DECLINED"
        | "PAYER_CANNOT_PAY"
        | "TRANSACTION_REFUSED"
        | "PAYEE_BLOCKED_TRANSACTION" => Some(Decline::Declined),
        "AUTHORIZATION_EXPIRED" | "AUTHORIZATION_VOIDED" => Some(Decline::Lapsed),
        "TRANSACTION_LIMIT_EXCEEDED" => Some(Decline::LimitExceeded),
        _ => None,
    }
}

/// Digits behind the point.
fn decimals(currency: Currency) -> Result<u32, Trouble> {
    match currency.as_str() {
        "JPY" => Ok(0),
        "AUD" | "BRL" | "CAD" | "CHF" | "CNY" | "CZK" | "DKK" | "EUR" | "GBP" | "HKD" | "ILS"
        | "MXN" | "MYR" | "NOK" | "NZD" | "PHP" | "PLN" | "SEK" | "SGD" | "THB" | "USD" => Ok(2),
        other => Err(Trouble::Refused(format!("PayPal does not take {other}"))),
    }
}

/// Money as PayPal writes it.
fn amount(money: Money) -> Result<Value, Trouble> {
    let Money { amount, currency } = money;
    let value = match decimals(currency)? {
        0 => amount.to_string(),
        _ => format!("{}.{:02}", amount / 100, amount % 100),
    };
    Ok(json!({ "currency_code": currency.as_str(), "value": value }))
}

/// Money as PayPal writes it, in minor units of the currency that it must have.
fn minor(amount: &Value, currency: Currency) -> Result<i64, Trouble> {
    let wrong = || Trouble::Disagrees(format!("{amount} is no amount of {}", currency.as_str()));
    if text(amount, "/currency_code") != Some(currency.as_str()) {
        return Err(wrong());
    }
    let value = text(amount, "/value").ok_or_else(wrong)?;
    let (whole, rest) = value.split_once('.').unwrap_or((value, ""));
    let digits = usize::try_from(decimals(currency)?).unwrap_or(0);
    // Zeros behind what the currency has say nothing.
    let (rest, zeros) = rest.split_at(rest.len().min(digits));
    let plain = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !plain(whole) || !plain(rest) || zeros.bytes().any(|byte| byte != b'0') {
        return Err(wrong());
    }
    format!("{whole}{rest:0<digits$}")
        .parse()
        .map_err(|_| wrong())
}

/// A definite no.
fn refused(reply: &Reply) -> Trouble {
    if let Some(trouble) = wire::not_let_in(reply) {
        return trouble;
    }
    let member = |path| text(&reply.body, path).unwrap_or("-");
    Trouble::Refused(format!(
        "status {}, {} {}: {}",
        reply.status.as_u16(),
        member("/name"),
        member("/details/0/issue"),
        member("/message")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn money(amount: i64, currency: &str) -> Money {
        Money {
            amount,
            currency: Currency::parse(currency).unwrap(),
        }
    }

    #[test]
    fn amounts_are_written_and_read_exactly() {
        for (minor_units, currency, written) in [
            (1, "EUR", "0.01"),
            (1999, "EUR", "19.99"),
            (100, "USD", "1.00"),
            (100_000_000_000_000, "USD", "1000000000000.00"),
            (1999, "JPY", "1999"),
        ] {
            let money = money(minor_units, currency);
            let value = amount(money).unwrap();
            assert_eq!(value["value"], written);
            assert_eq!(minor(&value, money.currency), Ok(minor_units));
        }
        let eur = Currency::parse("EUR").unwrap();
        for (value, currency) in [
            ("19.999", "EUR"),
            ("-1.00", "EUR"),
            ("", "EUR"),
            (".5", "EUR"),
            ("1e3", "EUR"),
            ("1.00", "USD"),
            ("99999999999999999999.00", "EUR"),
        ] {
            let amount = json!({ "currency_code": currency, "value": value });
            assert!(minor(&amount, eur).is_err(), "{value} {currency}");
        }
        for (value, expected) in [("5", 500), ("5.5", 550), ("5.500", 550)] {
            let amount = json!({ "currency_code": "EUR", "value": value });
            assert_eq!(minor(&amount, eur), Ok(expected));
        }
        assert!(amount(money(1, "KWD")).is_err());
    }
}
