//! Sales: making them, watching them, and what operators do to them while they run.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header::LOCATION},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Nothing, Path, Query},
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
        limits::{ALLOCATION_MAX, BUYER_LIMIT_MAX},
        money::Money,
        round::{self, Intent, Terms, TermsError, Window},
    },
    sales::{SaleError, Shop},
    store::{
        products::Products,
        sales::{Filter, NewSale},
    },
};

const NAME_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=200;
const SMALL_PRINT_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=10_000;

/// Where new sales live. A sale stays for life where it was made.
const HOME: Partition = Partition(0);

pub(super) fn routes() -> Routes {
    const RUNS: &[Code] = &[Code::NotFound, Code::Conflict, Code::Validation];
    Routes::new()
        .add(Access::Anyone, routes!(list), &[Code::Validation])
        .add(Access::Anyone, routes!(get), &[Code::NotFound])
        .add(
            Access::Operator,
            routes!(create),
            &[Code::IdempotencyKeyMismatch],
        )
        .add(Access::Operator, routes!(pause), RUNS)
        .add(Access::Operator, routes!(resume), RUNS)
        .add(Access::Operator, routes!(close), RUNS)
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
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SaleRequest {
    product_id: Uuid,
    /// The product's name if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 200)]
    name: Option<String>,
    /// The small print.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 10_000)]
    terms: Option<String>,
    /// Of one unit; the product's price if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Price, required = false)]
    price: Option<Price>,
    /// Units to sell.
    #[schema(example = 100, minimum = 1, maximum = 10_000_000)]
    allocation: i64,
    /// Units that one buyer may have.
    #[schema(example = 2, minimum = 1, maximum = 1_000_000)]
    per_buyer_limit: i64,
    /// Units that one order may ask for; `per_buyer_limit` if absent, and never more.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 1_000_000)]
    per_order_limit: Option<i64>,
    /// May lie in the past: then the sale is open at once.
    opens_at: Timestamp,
    /// If absent, the sale runs until it is sold out or closed.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Timestamp, required = false)]
    closes_at: Option<Timestamp>,
    /// Not supported.
    #[serde(default, deserialize_with = "present")]
    #[schema(ignore)]
    hold_seconds: Option<Value>,
    /// How orders are paid: `none`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, pattern = "^none$")]
    payment: Option<String>,
    /// Not supported.
    #[serde(default, deserialize_with = "present")]
    #[schema(ignore)]
    schedule: Option<Value>,
    /// What an acceptance survives: `default`, as Redis is set up.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, pattern = "^default$")]
    durability: Option<String>,
}

/// Units to add.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Restock {
    #[schema(example = 10, minimum = 1, maximum = 10_000_000)]
    units: i64,
}

/// A sale as it stands.
#[derive(Serialize, ToSchema)]
struct SaleView {
    id: Uuid,
    product_id: Uuid,
    name: String,
    /// The small print.
    terms: Option<String>,
    /// Of one unit.
    #[schema(value_type = Price)]
    price: Money,
    state: round::State,
    /// Whether nothing is left.
    sold_out: bool,
    /// Which running of the sale this is.
    round: u32,
    /// Units given to the round so far: always `remaining` + `held` + `sold`.
    allocation: u64,
    remaining: u64,
    /// Units of orders that wait for their payment.
    held: u64,
    sold: u64,
    /// The number of the round's last event.
    seq: u64,
    per_buyer_limit: u64,
    per_order_limit: u64,
    opens_at: Timestamp,
    closes_at: Option<Timestamp>,
    /// The clock that decides, in milliseconds since the Unix epoch.
    server_time_ms: i64,
    #[schema(example = "none")]
    payment: &'static str,
    #[schema(example = "default")]
    durability: &'static str,
    created_at: Timestamp,
    updated_at: Timestamp,
}

impl From<crate::sales::SaleView> for SaleView {
    fn from(view: crate::sales::SaleView) -> Self {
        let crate::sales::SaleView { facts, standing } = view;
        Self {
            id: facts.id.0,
            product_id: facts.product.0,
            name: facts.name.clone(),
            terms: facts.small_print.clone(),
            price: facts.terms.unit_price,
            state: standing.state,
            sold_out: standing.sold_out(),
            round: standing.round.round,
            allocation: standing.counters.allocation,
            remaining: standing.counters.remaining,
            held: standing.counters.held,
            sold: standing.counters.sold,
            seq: standing.counters.seq,
            per_buyer_limit: facts.terms.per_buyer_limit,
            per_order_limit: facts.terms.per_order_limit,
            opens_at: Timestamp::from_ms(standing.window.opens_at_ms),
            closes_at: standing.window.closes_at_ms.map(Timestamp::from_ms),
            server_time_ms: standing.now_ms,
            payment: "none",
            durability: "default",
            created_at: Timestamp(facts.created_at),
            updated_at: Timestamp(facts.updated_at),
        }
    }
}

/// Which sales to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct SaleQuery {
    /// Only sales in this state.
    #[param(inline)]
    state: Option<round::State>,
    /// Sales on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// List sales
///
/// Newest first, each as it stands at the moment.
#[utoipa::path(get, path = "/v1/sales", tag = "sales", params(SaleQuery),
    responses((status = 200, description = "A page", body = Page<SaleView>)))]
async fn list(
    State(shop): State<Arc<Shop>>,
    Query(query): Query<SaleQuery>,
) -> Result<axum::Json<Page<SaleView>>, Problem> {
    let page = Pagination::<SaleNumber>::read(query.limit, query.cursor.as_deref())?;
    let filter = Filter {
        state: query.state,
        now: clock::now(),
        product: None,
        after: page.after,
        limit: page.rows(),
    };
    let rows = shop.list(filter).await?;
    let mut page = page.page(rows, |row| row.facts.number, SaleView::from);
    // PostgreSQL chose them, and it may be behind what Redis has said since.
    page.retain(|sale| query.state.is_none_or(|state| sale.state == state));
    Ok(axum::Json(page))
}

/// Get a sale
///
/// Never older than the request.
#[utoipa::path(get, path = "/v1/sales/{id}", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn get(
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<axum::Json<SaleView>, Problem> {
    Ok(axum::Json(shop.view(SaleId(id)).await?.into()))
}

/// Make a sale
///
/// It can sell as soon as this is answered. With an `Idempotency-Key` a retry makes no other sale,
/// and gets the one that is there.
#[utoipa::path(post, path = "/v1/sales", tag = "sales", request_body = SaleRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 201, description = "The sale", body = SaleView)))]
async fn create(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    State(products): State<Products>,
    key: Option<IdempotencyKey>,
    Json(request): Json<SaleRequest>,
) -> Result<Response, Problem> {
    let offer = request.check()?;
    // Strings, numbers and instants always become JSON.
    let canonical = serde_json::to_vec(&request).map_err(Problem::internal)?;
    let product = products
        .by_id(offer.product)
        .await
        .map_err(|error| Problem::from(error).of_reading())?
        .ok_or(SaleError::NoProduct)?;
    let terms = offer.terms(product.content.price)?;
    let id = SaleId(match &key {
        Some(key) => OperationId::derive("sales.create", operator.user, &key.0).0,
        None => clock::new_id(),
    });
    let sale = NewSale {
        id,
        fingerprint: Fingerprint::of(&[b"sale", &canonical]),
        partition: HOME,
        product: offer.product,
        name: offer.name.unwrap_or(product.content.name),
        small_print: offer.small_print,
        terms,
        created_by: operator.user,
    };
    let (view, replayed) = shop.create(sale).await.map_err(Problem::of_making)?;
    // Hexadecimal digits and hyphens are always a header's value.
    let location = HeaderValue::try_from(format!("/v1/sales/{id}")).map_err(Problem::internal)?;
    let headers = [(LOCATION, location)];
    let replayed = replayed.then_some([(IDEMPOTENCY_REPLAYED, REPLAYED)]);
    let body = axum::Json(SaleView::from(view));
    Ok((StatusCode::CREATED, headers, replayed, body).into_response())
}

/// Pause a sale
///
/// Nobody can buy until it is resumed. Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/sales/{id}/pause", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn pause(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<SaleView>, Problem> {
    let view = shop.control(SaleId(id), Intent::Paused, operator.user);
    Ok(axum::Json(view.await?.into()))
}

/// Resume a sale
///
/// Takes a pause back. Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/sales/{id}/resume", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn resume(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<SaleView>, Problem> {
    let view = shop.control(SaleId(id), Intent::Live, operator.user);
    Ok(axum::Json(view.await?.into()))
}

/// Close a sale
///
/// For ever. Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/sales/{id}/close", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn close(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<SaleView>, Problem> {
    let view = shop.control(SaleId(id), Intent::Closed, operator.user);
    Ok(axum::Json(view.await?.into()))
}

/// Add units to a sale
///
/// Once for each `Idempotency-Key`, however often it is sent.
#[utoipa::path(post, path = "/v1/sales/{id}/restock", tag = "sales", request_body = Restock,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn restock(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    key: IdempotencyKey,
    Json(restock): Json<Restock>,
) -> Result<Response, Problem> {
    let mut check = Check::new();
    let units = check.units("#/units", restock.units, 1..=ALLOCATION_MAX);
    check.done()?;
    let (view, replayed) = shop
        .restock(SaleId(id), units, operator.user, &key.0)
        .await?;
    let replayed = replayed.then_some([(IDEMPOTENCY_REPLAYED, REPLAYED)]);
    Ok((replayed, axum::Json(SaleView::from(view))).into_response())
}

/// A request for a sale whose values are in range by themselves.
struct Offer {
    product: ProductId,
    name: Option<String>,
    small_print: Option<String>,
    price: Option<Money>,
    allocation: u64,
    per_buyer_limit: u64,
    per_order_limit: u64,
    window: Window,
}

impl SaleRequest {
    fn check(&self) -> Result<Offer, Problem> {
        let mut check = Check::new();
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
        let name = self
            .name
            .as_ref()
            .map(|name| check.text("#/name", name, NAME_CHARACTERS));
        let small_print = self
            .terms
            .as_ref()
            .map(|terms| check.text("#/terms", terms, SMALL_PRINT_CHARACTERS));
        let price = self
            .price
            .as_ref()
            .and_then(|price| check.price("#/price", price));
        let window = Window {
            opens_at_ms: check.instant("#/opens_at", self.opens_at),
            closes_at_ms: self
                .closes_at
                .map(|instant| check.instant("#/closes_at", instant)),
        };
        if window
            .closes_at_ms
            .is_some_and(|end| end <= window.opens_at_ms)
        {
            check.refuse("#/closes_at", TermsError::Window.to_string());
        }
        for (pointer, given) in [
            ("#/hold_seconds", &self.hold_seconds),
            ("#/schedule", &self.schedule),
        ] {
            if given.is_some() {
                check.refuse(pointer, "not supported");
            }
        }
        for (pointer, given, only) in [
            ("#/payment", &self.payment, "none"),
            ("#/durability", &self.durability, "default"),
        ] {
            if given.as_ref().is_some_and(|given| given != only) {
                check.refuse(pointer, format!("not supported; only {only} is"));
            }
        }
        check.done().map(|()| Offer {
            product: ProductId(self.product_id),
            name,
            small_print,
            price,
            allocation,
            per_buyer_limit,
            per_order_limit,
            window,
        })
    }
}

impl Offer {
    /// The rules of the first round; the values are in range together too.
    fn terms(&self, product_price: Money) -> Result<Terms, Problem> {
        let terms = Terms {
            window: self.window,
            per_buyer_limit: self.per_buyer_limit,
            per_order_limit: self.per_order_limit,
            unit_price: self.price.unwrap_or(product_price),
            allocation: self.allocation,
        };
        terms.check().map(|()| terms).map_err(|error| {
            let pointer = match error {
                TermsError::Allocation => "#/allocation",
                TermsError::BuyerLimit => "#/per_buyer_limit",
                TermsError::OrderLimit => "#/per_order_limit",
                TermsError::Window => "#/closes_at",
                TermsError::Total => "#/price",
            };
            Problem::out_of_range(vec![FieldError::new(pointer, error.to_string())])
        })
    }
}
