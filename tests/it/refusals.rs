//! Every refusal of the contract, provoked over HTTP, with its whole document, and the proof that
//! it changed nothing.

mod accounts;
mod foreign;
mod hostile;
mod input;
mod purchase;
mod routes;
mod sales;
mod tokens;

use serde_json::{Value, json};

use super::support::app::{Answer, App, sql};

/// Every code that a client can provoke: its status and its title. `validation` has 422 too.
const CODES: &[(&str, u16, &str)] = &[
    ("not_open", 409, "The sale is not open yet"),
    ("paused", 409, "The sale is paused"),
    ("closed", 409, "The sale is closed"),
    ("sold_out", 409, "Sold out"),
    ("insufficient", 409, "Fewer units are left than asked for"),
    ("buyer_limit", 409, "More than one buyer may have"),
    ("order_limit", 422, "More than one order may ask for"),
    (
        "idempotency_key_missing",
        400,
        "An Idempotency-Key is required",
    ),
    (
        "idempotency_key_mismatch",
        422,
        "The key belongs to another request",
    ),
    ("validation", 400, "The request is not valid"),
    ("unauthenticated", 401, "A valid access token is required"),
    ("invalid_credentials", 401, "The credentials are not valid"),
    ("forbidden", 403, "Not allowed for this role"),
    ("not_found", 404, "Not found"),
    ("method_not_allowed", 405, "The method is not allowed here"),
    ("conflict", 409, "The state of things does not allow this"),
    ("email_taken", 409, "The e-mail address is taken"),
    ("rate_limited", 429, "Too many requests"),
    ("request_timeout", 408, "The request came too slowly"),
    ("precondition_failed", 412, "It has changed meanwhile"),
    ("precondition_required", 428, "If-Match is required"),
    ("payload_too_large", 413, "The body is too large"),
    (
        "unsupported_media_type",
        415,
        "The body's type is not the one expected",
    ),
    ("unavailable", 503, "Not available at the moment"),
];

/// The answer refuses with `code`, and says exactly what the contract says about that: these
/// members and `facts`, these headers, and nothing was done.
#[track_caller]
fn refused(answer: &Answer, code: &str, retry: &str, facts: Value) {
    let status = CODES.iter().find(|(known, ..)| *known == code).unwrap().1;
    document(answer, status, code, "not_applied", retry, facts);
}

/// The answer refuses the request for what stands at `pointer`: 400 when it cannot be read, 422
/// when it is out of range.
#[track_caller]
fn invalid(answer: &Answer, status: u16, pointer: &str) {
    let errors = answer.json()["errors"].clone();
    let places: Vec<_> = errors
        .as_array()
        .unwrap_or_else(|| panic!("no errors: {answer:?}"))
        .iter()
        .map(|error| error["pointer"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(places, [pointer], "{answer:?}");
    assert_eq!(errors[0].as_object().unwrap().len(), 2, "{answer:?}");
    assert_ne!(errors[0]["detail"].as_str().unwrap(), "", "{answer:?}");
    document(
        answer,
        status,
        "validation",
        "not_applied",
        "never",
        json!({ "errors": errors }),
    );
}

/// The answer is this problem document, member by member and header by header.
#[track_caller]
fn document(answer: &Answer, status: u16, code: &str, outcome: &str, retry: &str, facts: Value) {
    let body = answer.json();
    let title = CODES.iter().find(|(known, ..)| *known == code).unwrap().2;
    let detail = body["detail"].as_str().unwrap_or_default();
    let mut expected = json!({
        "type": format!("/docs/problems/{code}"), "title": title, "status": status,
        "detail": detail, "instance": answer.header("x-request-id"), "code": code,
        "outcome": outcome, "retry": retry,
    });
    let Value::Object(facts) = facts else {
        panic!("facts are members: {facts}")
    };
    expected.as_object_mut().unwrap().extend(facts);
    assert_eq!(body, expected);
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(detail.ends_with('.'), "not a sentence: {detail}");
    // Nothing of the inside.
    assert!(!answer.text.contains("{p0}"), "{answer:?}");

    let length = answer.text.len().to_string();
    for (name, value) in [
        ("content-type", "application/problem+json"),
        ("content-length", length.as_str()),
        ("cache-control", "no-store"),
    ] {
        assert_eq!(answer.header(name), Some(value), "{name}: {answer:?}");
    }
    let wait = answer.header("retry-after").map(str::parse::<u64>);
    match retry {
        "after" => assert!(matches!(wait, Some(Ok(1..))), "{answer:?}"),
        _ => assert_eq!(wait, None, "{answer:?}"),
    }
    let bearer = (status == 401).then_some("Bearer");
    assert_eq!(answer.header("www-authenticate"), bearer, "{answer:?}");
    assert_eq!(
        answer.header("allow").is_some(),
        status == 405,
        "{answer:?}"
    );
}

/// A sale as it stands, without the time of day.
async fn standing(app: &App, sale: &str) -> Value {
    let mut view = app.view(sale).await;
    let time = view.as_object_mut().unwrap().remove("server_time_ms");
    assert!(time.is_some_and(|time| time.is_u64()), "{view}");
    view
}

/// Rows of sales, orders and events in PostgreSQL, once everything of `sale` is stored.
async fn rows(app: &App, sale: &str) -> (i64, i64, i64) {
    let audit = app.audit(sale).await;
    assert_eq!(audit["verdict"], "pass", "{audit:#}");
    sqlx::query_as(
        "SELECT (SELECT count(*) FROM sales), (SELECT count(*) FROM orders),
                (SELECT count(*) FROM round_events)",
    )
    .fetch_one(&mut sql(app).await)
    .await
    .unwrap()
}

/// What must be the same after a refusal as before it.
struct Unchanged<'a> {
    app: &'a App,
    sale: &'a str,
    standing: Value,
    rows: (i64, i64, i64),
}

impl<'a> Unchanged<'a> {
    async fn since_now(app: &'a App, sale: &'a str) -> Self {
        Self {
            app,
            sale,
            standing: standing(app, sale).await,
            rows: rows(app, sale).await,
        }
    }

    /// No unit has moved, no event has happened; cheap enough for every row of a table.
    async fn holds(&self, why: &str) {
        assert_eq!(standing(self.app, self.sale).await, self.standing, "{why}");
    }

    /// And nothing was written, anywhere.
    async fn at_the_end(self) {
        self.holds("at the end").await;
        assert_eq!(rows(self.app, self.sale).await, self.rows);
    }
}
