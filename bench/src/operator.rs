//! What an operator does over the API: makes the sale, looks at it, ends it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::client;
use crate::target::Target;

/// Time for one answer.
const ANSWER_MAX: Duration = Duration::from_mins(1);

/// Pause between two looks at something that is not ready yet.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long a server that is starting is waited for.
const START_MAX: Duration = Duration::from_secs(15);

/// Entries of one page of the leaderboard: the most that the API gives.
const PAGE: usize = 100;

/// The operator of one run.
#[derive(Clone)]
pub(crate) struct Operator {
    pub(crate) target: Target,
    pub(crate) bearer: String,
    /// How long a call is tried while the server is away.
    pub(crate) patience: Duration,
}

/// A sale as the API shows it, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Sale {
    pub(crate) id: Uuid,
    /// `scheduled`, `open`, `paused` or `closed`.
    pub(crate) state: String,
    pub(crate) allocation: u64,
    pub(crate) remaining: u64,
    pub(crate) held: u64,
    pub(crate) sold: u64,
}

/// The terms of a sale that is made.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) name: String,
    pub(crate) allocation: u64,
    pub(crate) per_buyer_limit: u64,
    pub(crate) opens_at: DateTime<Utc>,
    /// None: orders are confirmed at once.
    pub(crate) hold: Option<Hold>,
}

/// How orders wait for their payment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hold {
    pub(crate) seconds: u64,
    /// Who takes the money.
    pub(crate) payment: &'static str,
}

/// The server's own audit of a sale.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Audit {
    /// `pass`, `fail` or `pending`.
    pub(crate) verdict: String,
    pub(crate) checks: Vec<AuditCheck>,
}

/// One check of the server's audit.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
pub(crate) struct AuditCheck {
    pub(crate) name: String,
    pub(crate) status: String,
    pub(crate) expected: Value,
    pub(crate) actual: Value,
}

/// One entry of the leaderboard.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Place {
    pub(crate) rank: u64,
    pub(crate) buyer: String,
    pub(crate) quantity: u64,
    pub(crate) accepted_at: DateTime<Utc>,
    pub(crate) seq: u64,
}

#[derive(Deserialize)]
struct Made {
    id: Uuid,
}

#[derive(Deserialize)]
struct Page {
    data: Vec<Place>,
    has_more: bool,
    next_cursor: Option<String>,
}

/// Makes sure that a server answers and is ready.
///
/// # Errors
///
/// Nobody listens, or the server does not become ready.
pub(crate) async fn reach(target: &Target) -> Result<()> {
    let begun = Instant::now();
    loop {
        let request = Request::get("/readyz").header(HOST, &target.authority);
        let request = request.body(Full::new(Bytes::new()))?;
        let Ok(answer) = client::call(target.address, request, ANSWER_MAX).await else {
            bail!(
                "no server at http://{} — start one with `make run`",
                target.address
            );
        };
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        if begun.elapsed() > START_MAX {
            bail!(
                "the server at http://{} is not ready ({status})",
                target.address
            );
        }
        sleep(LOOK_AGAIN).await;
    }
}

impl Operator {
    /// Makes a product.
    pub(crate) async fn create_product(&self, name: &str, key: &str) -> Result<Uuid> {
        let product = json!({
            "name": name,
            "description": "Made by stockade-bench to be sold in one run.",
            "price": {"amount": 1999, "currency": "EUR"},
        });
        let made: Made = self
            .ask(&Method::POST, "/v1/products", Some(key), Some(product))
            .await
            .context("the product was not made")?;
        Ok(made.id)
    }

    /// Makes a sale; its round is provisioned when this returns.
    pub(crate) async fn create_sale(
        &self,
        product: Uuid,
        terms: &Terms,
        key: &str,
    ) -> Result<Sale> {
        let mut sale = json!({
            "product_id": product,
            "name": terms.name,
            "allocation": terms.allocation,
            "per_buyer_limit": terms.per_buyer_limit,
            "opens_at": terms.opens_at.to_rfc3339_opts(SecondsFormat::Millis, true),
        });
        if let Some(Hold { seconds, payment }) = terms.hold {
            sale["hold_seconds"] = seconds.into();
            sale["payment"] = payment.into();
        }
        self.ask(&Method::POST, "/v1/sales", Some(key), Some(sale))
            .await
            .context("the sale was not made")
    }

    /// The sale now.
    pub(crate) async fn sale(&self, id: Uuid) -> Result<Sale> {
        self.ask(&Method::GET, &format!("/v1/sales/{id}"), None, None)
            .await
            .context("the sale cannot be read")
    }

    /// Ends the sale.
    pub(crate) async fn close(&self, id: Uuid) -> Result<Sale> {
        let (path, key) = (format!("/v1/sales/{id}/close"), format!("close-{id}"));
        self.ask(&Method::POST, &path, Some(&key), None)
            .await
            .context("the sale was not closed")
    }

    /// The audit of a sale, when it has come to a verdict or time is up.
    pub(crate) async fn audit(&self, id: Uuid) -> Result<Audit> {
        let (path, begun) = (format!("/v1/sales/{id}/audit"), Instant::now());
        loop {
            let audit: Audit = self
                .ask(&Method::GET, &path, None, None)
                .await
                .context("the audit cannot be read")?;
            if audit.verdict != "pending" || begun.elapsed() > self.patience {
                return Ok(audit);
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// The whole leaderboard of a sale, page by page.
    pub(crate) async fn leaderboard(&self, id: Uuid) -> Result<Vec<Place>> {
        let first = format!("/v1/sales/{id}/leaderboard?limit={PAGE}");
        let (mut path, mut places) = (first.clone(), Vec::new());
        loop {
            let page: Page = self
                .ask(&Method::GET, &path, None, None)
                .await
                .context("the leaderboard cannot be read")?;
            let empty = page.data.is_empty();
            places.extend(page.data);
            match page.next_cursor {
                Some(_) if page.has_more && empty => {
                    bail!("the leaderboard has an empty page before its end")
                }
                Some(cursor) if page.has_more => path = format!("{first}&cursor={cursor}"),
                None if page.has_more => bail!("the leaderboard has more pages but no cursor"),
                _ => return Ok(places),
            }
        }
    }

    /// One call that is tried again while the server is away; safe because a call that changes
    /// something has a key.
    async fn ask<T: DeserializeOwned>(
        &self,
        method: &Method,
        path: &str,
        key: Option<&str>,
        body: Option<Value>,
    ) -> Result<T> {
        let body = body.map(|body| Bytes::from(body.to_string()));
        let begun = Instant::now();
        loop {
            let trouble = match self.send(method, path, key, body.clone()).await {
                Ok(answer) if answer.status().is_success() => {
                    return serde_json::from_slice(answer.body())
                        .with_context(|| format!("{method} {path} gave {}", text(&answer)));
                }
                Ok(answer) if answer.status() == StatusCode::UNAUTHORIZED => bail!(
                    "the server does not know our tokens: is STOCKADE_JWT_SECRET, or the secret in \
                     --data-dir, really this server's?"
                ),
                Ok(answer)
                    if answer.status().is_server_error()
                        || answer.status() == StatusCode::TOO_MANY_REQUESTS =>
                {
                    format!("{method} {path} gave {}", text(&answer))
                }
                Ok(answer) => bail!("{method} {path} gave {}", text(&answer)),
                Err(error) => format!("{method} {path}: {error:#}"),
            };
            if begun.elapsed() > self.patience {
                bail!(trouble);
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    async fn send(
        &self,
        method: &Method,
        path: &str,
        key: Option<&str>,
        body: Option<Bytes>,
    ) -> Result<Response<Bytes>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.target.authority)
            .header(AUTHORIZATION, &self.bearer);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body.unwrap_or_default()))?;
        client::call(self.target.address, request, ANSWER_MAX).await
    }
}

/// An answer in one line, for an error message.
fn text(answer: &Response<Bytes>) -> String {
    let body = String::from_utf8_lossy(answer.body());
    format!(
        "{} {}",
        answer.status().as_u16(),
        body.chars().take(300).collect::<String>()
    )
}
