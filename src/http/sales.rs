//! Sales: made, looked at, steered by operators.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{
        HeaderValue, StatusCode,
        header::{CACHE_CONTROL, LOCATION},
    },
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Path, Query},
    caller::Operator,
    check::{Check, Price, Timestamp, present},
    idempotency::{IDEMPOTENCY_REPLAYED, IdempotencyKey, REPLAYED},
    page::{Page, Pagination},
    problem::{Code, FieldError, Problem},
    routes::{Access, Routes},
};
use crate::{
    clock,
    domain::{
        id::{Fingerprint, OperationId, Partition, ProductId, SaleId, SaleNumber},
        limits::{ALLOCATION_MAX, BUYER_LIMIT_MAX, CALL_DEADLINE_MS},
        round::{Intent, State as RoundState, Terms, TermsError, Window},
    },
    engine::EngineError,
    sales::{SaleError, SaleView, Shop},
    store::{
        StoreError,
        products::Products,
        sales::{Filter, NewSale},
    },
};

/// Answers that say how things stand are out of date at once.
pub(super) const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");

const NAME_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=200;
const TERMS_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=10_000;

/// The last instant that RFC 3339 can write: the end of the year 9999.
const INSTANT_MAX_MS: i64 = 253_402_300_799_999;

pub(super) fn routes() -> Routes {
    const STEERED: &[Code] = &[Code::NotFound, Code::Conflict];
    Routes::new()
        .add(Access::Anyone, routes!(list), &[Code::Validation])
        .add(Access::Anyone, routes!(get), &[Code::NotFound])
        .add(
            Access::Operator,
            routes!(create),
            &[Code::IdempotencyKeyMismatch],
        )
        .add(Access::Operator, routes!(pause), STEERED)
        .add(Access::Operator, routes!(resume), STEERED)
        .add(Access::Operator, routes!(close), STEERED)
        .add(
            Access::Operator,
            routes!(restock),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::IdempotencyKeyMissing,
                Code::IdempotencyKeyMismatch,
            ],
        )
}

/// A sale to make.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewSaleBody {
    product_id: Uuid,
    /// The product's name if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 200)]
    name: Option<String>,
    /// The small print.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 10_000)]
    terms: Option<String>,
    /// The product's price if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Price, required = false)]
    price: Option<Price>,
    /// Units to sell, 1 to 10^7.
    #[schema(example = 200, minimum = 1, maximum = 10_000_000)]
    allocation: i64,
    /// Units that one buyer may have, 1 to 10^6.
    #[schema(example = 1, minimum = 1, maximum = 1_000_000)]
    per_buyer_limit: i64,
    /// Units that one order may ask for; as many as one buyer may have if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 1_000_000)]
    per_order_limit: Option<i64>,
    /// The first instant of selling; one in the past opens at once.
    opens_at: DateTime<Utc>,
    /// The first instant after selling; until sold out or closed if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = DateTime<Utc>, required = false)]
    closes_at: Option<DateTime<Utc>>,
    /// Not supported yet.
    #[serde(default)]
    #[schema(value_type = Object, required = false, ignore)]
    hold_seconds: Option<serde_json::Value>,
    /// Not supported yet.
    #[serde(default)]
    #[schema(value_type = Object, required = false, ignore)]
    schedule: Option<serde_json::Value>,
    /// `none`: an order is confirmed at once.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, example = "none")]
    payment: Option<String>,
    /// `default`: what the Redis of this installation gives.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, example = "default")]
    durability: Option<String>,
}

/// Units to add.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Restock {
    /// 1 to 10^7; the allocation stays within 10^7.
    #[schema(example = 50, minimum = 1, maximum = 10_000_000)]
    units: i64,
}

/// A sale as it stands.
#[derive(Serialize, ToSchema)]
struct Sale {
    id: Uuid,
    product_id: Uuid,
    name: String,
    terms: Option<String>,
    /// Of one unit.
    price: Price,
    /// `scheduled`, `open`, `paused` or `closed`.
    #[schema(example = "open")]
    state: &'static str,
    /// Whether no unit is left.
    sold_out: bool,
    /// The current round: 1, 2, 3 ….
    round: u32,
    allocation: u64,
    remaining: u64,
    held: u64,
    sold: u64,
    /// The number of the round's last event.
    seq: u64,
    per_buyer_limit: u64,
    per_order_limit: u64,
    opens_at: Timestamp,
    closes_at: Option<Timestamp>,
    #[schema(example = "none")]
    payment: &'static str,
    #[schema(example = "default")]
    durability: &'static str,
    created_at: Timestamp,
    updated_at: Timestamp,
    /// The clock that decides when the sale opens, milliseconds since the Unix epoch.
    server_time_ms: i64,
}

impl From<SaleView> for Sale {
    fn from(SaleView { facts, standing }: SaleView) -> Self {
        let counters = standing.counters;
        Self {
            id: facts.id.0,
            product_id: facts.product.0,
            name: facts.name.clone(),
            terms: facts.small_print.clone(),
            price: facts.terms.unit_price.into(),
            state: standing.state.as_str(),
            sold_out: standing.sold_out(),
            round: facts.round,
            allocation: counters.allocation,
            remaining: counters.remaining,
            held: counters.held,
            sold: counters.sold,
            seq: counters.seq,
            per_buyer_limit: facts.terms.per_buyer_limit,
            per_order_limit: facts.terms.per_order_limit,
            opens_at: Timestamp::from_ms(standing.window.opens_at_ms),
            closes_at: standing.window.closes_at_ms.map(Timestamp::from_ms),
            payment: "none",
            durability: "default",
            created_at: Timestamp(facts.created_at),
            updated_at: Timestamp(facts.updated_at),
            server_time_ms: standing.now_ms,
        }
    }
}

/// What a sale can be.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum StateWord {
    Scheduled,
    Open,
    Paused,
    Closed,
}

/// Which sales to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct SaleQuery {
    /// Only sales in this state.
    #[param(inline)]
    state: Option<StateWord>,
    /// Sales on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// List sales, newest first
#[utoipa::path(get, path = "/v1/sales", tag = "sales", params(SaleQuery),
    responses((status = 200, description = "A page", body = Page<Sale>)))]
async fn list(
    State(shop): State<Arc<Shop>>,
    Query(query): Query<SaleQuery>,
) -> Result<Response, Problem> {
    let page = Pagination::<SaleNumber>::read(query.limit, query.cursor.as_deref())?;
    let state = query.state.map(|word| match word {
        StateWord::Scheduled => RoundState::Scheduled,
        StateWord::Open => RoundState::Open,
        StateWord::Paused => RoundState::Paused,
        StateWord::Closed => RoundState::Closed,
    });
    let filter = Filter {
        state,
        now: clock::now(),
        product: None,
        after: page.after,
        limit: page.rows(),
    };
    let rows = shop.list(filter).await?;
    let page = page.page(rows, |view| view.facts.number, Sale::from);
    Ok(([(CACHE_CONTROL, NO_STORE)], axum::Json(page)).into_response())
}

/// Get a sale as it stands
///
/// Never older than the request.
#[utoipa::path(get, path = "/v1/sales/{id}", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = Sale)))]
async fn get(State(shop): State<Arc<Shop>>, Path(id): Path<Uuid>) -> Result<Response, Problem> {
    Ok(shown(shop.view(SaleId(id)).await?))
}

/// Make a sale
///
/// Answers once its round can be sold. With an `Idempotency-Key` a retry makes nothing and gets
/// the sale as it stands.
#[utoipa::path(post, path = "/v1/sales", tag = "sales", request_body = NewSaleBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 201, description = "The sale", body = Sale)))]
async fn create(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    State(products): State<Products>,
    key: Option<IdempotencyKey>,
    Json(body): Json<NewSaleBody>,
) -> Result<Response, Problem> {
    let product = products.by_id(ProductId(body.product_id)).await?;
    let (name, price) = match product {
        Some(product) => (product.content.name, product.content.price),
        None => return Err(SaleError::NoProduct.into()),
    };
    let id = match &key {
        Some(key) => OperationId::derive("sales.create", operator.user, &key.0).0,
        None => clock::new_id(),
    };
    let sale = body.check(SaleId(id), operator.user, name, price)?;
    let (view, replayed) = shop.create(sale).await?;
    let location = HeaderValue::from_str(&format!("/v1/sales/{id}")).map_err(Problem::internal)?;
    let replayed = replayed.then_some([(IDEMPOTENCY_REPLAYED, REPLAYED)]);
    let headers = [(LOCATION, location), (CACHE_CONTROL, NO_STORE)];
    Ok((
        StatusCode::CREATED,
        headers,
        replayed,
        axum::Json(Sale::from(view)),
    )
        .into_response())
}

/// Pause a sale
#[utoipa::path(post, path = "/v1/sales/{id}/pause", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = Sale)))]
async fn pause(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    Ok(shown(
        shop.control(SaleId(id), Intent::Paused, operator.user)
            .await?,
    ))
}

/// Resume a paused sale
#[utoipa::path(post, path = "/v1/sales/{id}/resume", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = Sale)))]
async fn resume(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    Ok(shown(
        shop.control(SaleId(id), Intent::Live, operator.user)
            .await?,
    ))
}

/// Close a sale for good
#[utoipa::path(post, path = "/v1/sales/{id}/close", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = Sale)))]
async fn close(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    Ok(shown(
        shop.control(SaleId(id), Intent::Closed, operator.user)
            .await?,
    ))
}

/// Add units to a sale
///
/// A retry with the same key adds nothing and gets the sale as it stands.
#[utoipa::path(post, path = "/v1/sales/{id}/restock", tag = "sales", request_body = Restock,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 200, description = "The sale", body = Sale)))]
async fn restock(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    key: IdempotencyKey,
    Json(body): Json<Restock>,
) -> Result<Response, Problem> {
    let mut check = Check::new();
    let units = check.units("#/units", body.units, 1..=ALLOCATION_MAX);
    check.done()?;
    let (view, replayed) = shop
        .restock(SaleId(id), units, operator.user, &key.0)
        .await?;
    let replayed = replayed.then_some([(IDEMPOTENCY_REPLAYED, REPLAYED)]);
    Ok((replayed, shown(view)).into_response())
}

fn shown(view: SaleView) -> Response {
    ([(CACHE_CONTROL, NO_STORE)], axum::Json(Sale::from(view))).into_response()
}

impl NewSaleBody {
    fn check(
        self,
        id: SaleId,
        created_by: Uuid,
        product_name: String,
        product_price: crate::domain::money::Money,
    ) -> Result<NewSale, Problem> {
        let mut check = Check::new();
        let name = match &self.name {
            Some(name) => check.text("#/name", name, NAME_CHARACTERS),
            None => product_name,
        };
        let small_print = self
            .terms
            .as_ref()
            .map(|terms| check.text("#/terms", terms, TERMS_CHARACTERS));
        let unit_price = match &self.price {
            Some(price) => check.price("#/price", price).unwrap_or(product_price),
            None => product_price,
        };
        let allocation = check.units("#/allocation", self.allocation, 1..=ALLOCATION_MAX);
        let per_buyer_limit = check.units(
            "#/per_buyer_limit",
            self.per_buyer_limit,
            1..=BUYER_LIMIT_MAX,
        );
        let per_order_limit = match self.per_order_limit {
            Some(limit) => check.units("#/per_order_limit", limit, 1..=per_buyer_limit),
            None => per_buyer_limit,
        };
        let opens_at_ms = instant(&mut check, "#/opens_at", self.opens_at);
        let closes_at_ms = self
            .closes_at
            .map(|end| instant(&mut check, "#/closes_at", end));
        for (pointer, given) in [
            ("#/hold_seconds", &self.hold_seconds),
            ("#/schedule", &self.schedule),
        ] {
            if given.is_some() {
                check.refuse(pointer, "is not supported yet");
            }
        }
        for (pointer, given, supported) in [
            ("#/payment", &self.payment, "none"),
            ("#/durability", &self.durability, "default"),
        ] {
            if given.as_deref().is_some_and(|given| given != supported) {
                check.refuse(pointer, format!("only `{supported}` is supported yet"));
            }
        }
        let window = Window {
            opens_at_ms,
            closes_at_ms,
        };
        let terms = Terms {
            window,
            per_buyer_limit,
            per_order_limit,
            unit_price,
            allocation,
        };
        check.done()?;
        // What is left are the relations between the values.
        terms.check().map_err(|error| {
            let pointer = match error {
                TermsError::Allocation => "#/allocation",
                TermsError::BuyerLimit => "#/per_buyer_limit",
                TermsError::OrderLimit => "#/per_order_limit",
                TermsError::Window => "#/closes_at",
                TermsError::Total => "#/price",
            };
            Problem::out_of_range(vec![FieldError::new(pointer, error.to_string())])
        })?;
        let small = small_print.as_deref().unwrap_or_default();
        let fingerprint = Fingerprint::of(&[
            self.product_id.as_bytes(),
            name.as_bytes(),
            small.as_bytes(),
            &unit_price.amount.to_be_bytes(),
            &unit_price.currency.bytes(),
            &allocation.to_be_bytes(),
            &per_buyer_limit.to_be_bytes(),
            &per_order_limit.to_be_bytes(),
            &opens_at_ms.to_be_bytes(),
            &closes_at_ms.unwrap_or(0).to_be_bytes(),
        ]);
        Ok(NewSale {
            id,
            fingerprint,
            partition: Partition(0),
            product: ProductId(self.product_id),
            name,
            small_print,
            terms,
            created_by,
        })
    }
}

/// Milliseconds since the Unix epoch, from 1970 to 9999.
fn instant(check: &mut Check, pointer: &str, instant: DateTime<Utc>) -> i64 {
    let ms = instant.timestamp_millis();
    if !(0..=INSTANT_MAX_MS).contains(&ms) {
        check.refuse(pointer, "must be in the years 1970 to 9999");
    }
    ms.clamp(0, INSTANT_MAX_MS)
}

impl From<EngineError> for Problem {
    fn from(error: EngineError) -> Self {
        let deadline = Duration::from_millis(CALL_DEADLINE_MS.unsigned_abs());
        if error.may_have_run() {
            return Self::unknown(
                "No answer from the store that decides. Retry with the same key: it is safe.",
                deadline,
            )
            .caused_by(error);
        }
        let detail = match &error {
            EngineError::Overloaded(_) => "Too many requests are waiting.",
            EngineError::Fenced(_) | EngineError::Damaged(_) => {
                "The stock is being verified; nothing is sold meanwhile."
            }
            _ => "The store that decides does not take requests.",
        };
        Self::unavailable(detail)
            .after(Duration::from_secs(1))
            .caused_by(error)
    }
}

impl From<SaleError> for Problem {
    fn from(error: SaleError) -> Self {
        match error {
            SaleError::NotFound => Self::not_found(),
            SaleError::Mismatch => Self::new(
                Code::IdempotencyKeyMismatch,
                "This key belongs to another request.",
            ),
            SaleError::NoProduct => Self::out_of_range(vec![FieldError::new(
                "#/product_id",
                "there is no such product",
            )]),
            SaleError::Conflict(detail) => Self::new(Code::Conflict, detail),
            SaleError::TooMany => Self::out_of_range(vec![FieldError::new(
                "#/units",
                format!("the allocation may be {ALLOCATION_MAX} units at most"),
            )]),
            SaleError::Engine(error) => error.into(),
            SaleError::Store(error) => match &*error {
                StoreError::Unavailable(_) => {
                    Self::unknown("The database does not answer.", Duration::from_secs(1))
                        .caused_by(error)
                }
                StoreError::Unexpected(_) => Self::internal(error),
            },
        }
    }
}
