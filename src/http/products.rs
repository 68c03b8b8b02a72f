//! The catalogue.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode,
        header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, LOCATION},
    },
    response::{IntoResponse, Response},
};
use chrono::{SubsecRound, TimeDelta};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Path, Query},
    caller::Operator,
    check::{Check, Price, Timestamp, present},
    idempotency::{IDEMPOTENCY_REPLAYED, IdempotencyKey, REPLAYED},
    images::ImageView,
    page::{Page, Pagination},
    problem::{Code, FieldError, Problem},
    routes::{Access, Routes},
    version::{IfMatch, content_etag, etag, seen_etag, stale, unchanged},
};
use crate::{
    catalogue::Catalogue,
    clock,
    domain::{
        id::{OperationId, ProductId},
        money::Currency,
    },
    realtime::FrameId,
    sales::{SaleView, Shop},
    store::products::{Added, After, Change, Changed, Content, IMAGES_MAX, Product, Search, Sort},
};

const NAME_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=200;
const DESCRIPTION_CHARACTERS: std::ops::RangeInclusive<usize> = 0..=4000;
const SEARCH_CHARACTERS_MAX: usize = 200;
const SEARCH_WORDS_MAX: usize = 10;
const SKU_BYTES: std::ops::RangeInclusive<usize> = 1..=64;

/// Kept by browsers, and asked for again each time: stock moves.
const ASK_AGAIN: (HeaderName, HeaderValue) =
    (CACHE_CONTROL, HeaderValue::from_static("public, no-cache"));

/// How long the catalogue waits for its stock.
const STOCK_TIMEOUT: Duration = Duration::from_millis(500);

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Anyone, routes!(list), &[Code::Validation])
        .add(Access::Anyone, routes!(get), &[Code::NotFound])
        .add(
            Access::Operator,
            routes!(create),
            &[Code::IdempotencyKeyMismatch, Code::Conflict],
        )
        .add(
            Access::Operator,
            routes!(change),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::PreconditionFailed,
                Code::PreconditionRequired,
            ],
        )
        .add(
            Access::Operator,
            routes!(remove),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::PreconditionFailed,
                Code::PreconditionRequired,
            ],
        )
}

/// A product to add.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewProduct {
    #[schema(example = "Blue lamp", min_length = 1, max_length = 200)]
    name: String,
    #[schema(example = "A lamp, blue.", max_length = 4000)]
    description: String,
    /// Your own number of it, which no other product may have: letters, digits, `.`, `_`, `/`, `-`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, example = "LAMP-42/B", max_length = 64,
        pattern = "^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$")]
    sku: Option<String>,
    price: Price,
}

/// What to change; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ProductChange {
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 200)]
    name: Option<String>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, max_length = 4000)]
    description: Option<String>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Price, required = false)]
    price: Option<Price>,
    /// Null takes it away.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, required = false, max_length = 64,
        pattern = "^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$")]
    #[expect(
        clippy::option_option,
        reason = "absent, null and a text are three things"
    )]
    sku: Option<Option<String>>,
    /// The ids of all its images, in the order to be shown.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Vec<Uuid>, required = false, max_items = 8)]
    images: Option<Vec<Uuid>>,
}

/// A product.
#[derive(Serialize, ToSchema)]
struct ProductView {
    id: Uuid,
    name: String,
    description: String,
    sku: Option<String>,
    price: Price,
    /// In the order to be shown; eight at most.
    images: Vec<ImageView>,
    /// Its open sale, if there is one.
    sale_id: Option<Uuid>,
    /// What is left in that sale.
    stock: Option<u64>,
    /// Where `stock` stands among the events of that sale: an event whose id is greater is newer.
    #[schema(example = "0000000001-0000000001-000000000000042-1")]
    stock_event_id: Option<String>,
    created_at: Timestamp,
    updated_at: Timestamp,
}

impl ProductView {
    fn new(product: &Product, sale: Option<&SaleView>) -> Self {
        Self {
            id: product.id.0,
            name: product.content.name.clone(),
            description: product.content.description.clone(),
            sku: product.content.sku.clone(),
            price: product.content.price.into(),
            images: product.images.iter().map(ImageView::from).collect(),
            sale_id: sale.map(|sale| sale.facts.id.0),
            stock: sale.map(|sale| sale.standing.counters.remaining),
            stock_event_id: sale.map(|sale| FrameId::of(&sale.standing).to_string()),
            created_at: Timestamp(product.created_at),
            updated_at: Timestamp(product.updated_at),
        }
    }
}

/// A product with its stock, and the `ETag` of both.
async fn with_stock(
    shop: &Shop,
    product: &Product,
) -> Result<(HeaderValue, Vec<u8>), serde_json::Error> {
    let mut sales = shop.open_sales(&[product.id], STOCK_TIMEOUT).await;
    let sale = sales.remove(&product.id);
    let body = serde_json::to_vec(&ProductView::new(product, sale.as_ref()))?;
    let etag = match sale {
        Some(_) => seen_etag(product.version, &body),
        None => etag(product.version),
    };
    Ok((etag, body))
}

const JSON: (HeaderName, HeaderValue) =
    (CONTENT_TYPE, HeaderValue::from_static("application/json"));

/// The body, or that the client has it already.
fn shown(headers: &HeaderMap, etag: HeaderValue, body: Vec<u8>) -> Response {
    let known = unchanged(headers, &etag);
    let headers = [(ETAG, etag), ASK_AGAIN];
    if known {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    (headers, [JSON], body).into_response()
}

/// Which way a list goes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Direction {
    Asc,
    #[default]
    Desc,
}

/// By what a list is sorted.
#[derive(Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum SortBy {
    Name,
    Price,
    #[default]
    CreatedAt,
}

/// Which products to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ProductQuery {
    /// Only products with all of these words in name, description or SKU; the beginning of a word
    /// is enough.
    #[param(max_length = 200)]
    q: Option<String>,
    /// Only the product with this SKU.
    sku: Option<String>,
    /// Only products that cost so much or more, in minor units.
    #[param(minimum = 0)]
    price_min: Option<i64>,
    /// Only products that cost so much or less, in minor units.
    #[param(minimum = 0)]
    price_max: Option<i64>,
    /// Only products priced in this currency.
    #[param(pattern = "^[A-Z]{3}$")]
    currency: Option<String>,
    /// Only products that have an open sale; `false`: only those that have none.
    on_sale: Option<bool>,
    /// By what to sort; `created_at` if absent.
    #[param(inline)]
    sort: Option<SortBy>,
    /// `desc` if absent.
    #[param(inline)]
    order: Option<Direction>,
    /// Products on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// List products
#[utoipa::path(get, path = "/v1/products", tag = "products", params(ProductQuery),
    responses(
        (status = 200, description = "A page", body = Page<ProductView>),
        (status = 304, description = "The client has it already"),
    ))]
async fn list(
    State(catalogue): State<Catalogue>,
    State(shop): State<Arc<Shop>>,
    Query(query): Query<ProductQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let page = Pagination::<After>::read(query.limit, query.cursor.as_deref())?;
    let search = query.check(&page)?;
    let (sort, descending, on_sale) = (search.sort, search.descending, search.on_sale);
    let rows = catalogue.search(search).await?;
    let ids: Vec<ProductId> = rows.iter().map(|product| product.id).collect();
    let sales = shop.open_sales(&ids, STOCK_TIMEOUT).await;
    let place = |product: &&Product| After::product(product, sort, descending);
    let view = |product: &Product| ProductView::new(product, sales.get(&product.id));
    let mut page = page.page(rows.iter().collect(), place, view);
    // PostgreSQL chose them, and it may be behind what Redis has said since.
    if let Some((wanted, _)) = on_sale {
        page.retain(|product| product.sale_id.is_some() == wanted);
    }
    // Strings and numbers always become JSON.
    let body = serde_json::to_vec(&page).map_err(Problem::internal)?;
    Ok(shown(&headers, content_etag(&body), body))
}

/// Get a product
#[utoipa::path(get, path = "/v1/products/{id}", tag = "products", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The product", body = ProductView),
        (status = 304, description = "The client has it already"),
    ))]
async fn get(
    State(catalogue): State<Catalogue>,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let product = catalogue.by_id(ProductId(id)).await?;
    let product = product.ok_or_else(Problem::not_found)?;
    let (etag, body) = with_stock(&shop, &product)
        .await
        .map_err(Problem::internal)?;
    Ok(shown(&headers, etag, body))
}

/// Add a product
///
/// With an `Idempotency-Key` a retry adds nothing and gets the first answer again.
#[utoipa::path(post, path = "/v1/products", tag = "products", request_body = NewProduct,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 201, description = "The product", body = ProductView)))]
async fn create(
    Operator(operator): Operator,
    State(catalogue): State<Catalogue>,
    State(shop): State<Arc<Shop>>,
    key: Option<IdempotencyKey>,
    Json(new): Json<NewProduct>,
) -> Result<Response, Problem> {
    let content = new.check()?;
    let id = match &key {
        Some(key) => OperationId::derive("products.create", operator.user, &key.0).0,
        None => clock::new_id(),
    };
    let (product, replayed) = match catalogue
        .add(ProductId(id), &content, key.is_some(), clock::now())
        .await?
    {
        Added::New(product) => (product, None),
        Added::Replayed(product) => (product, Some([(IDEMPOTENCY_REPLAYED, REPLAYED)])),
        Added::Mismatch => {
            let detail = "This key has added another product.";
            return Err(Problem::new(Code::IdempotencyKeyMismatch, detail));
        }
        Added::SkuTaken => return Err(sku_taken()),
    };
    // Hexadecimal digits and hyphens are always a header's value.
    let location =
        HeaderValue::from_str(&format!("/v1/products/{id}")).map_err(Problem::internal)?;
    let (etag, body) = with_stock(&shop, &product)
        .await
        .map_err(Problem::internal)?;
    let headers = [(ETAG, etag), (LOCATION, location), JSON];
    Ok((StatusCode::CREATED, headers, replayed, body).into_response())
}

/// Change a product
#[utoipa::path(patch, path = "/v1/products/{id}", tag = "products", request_body = ProductChange,
    params(("id" = Uuid, Path), ("If-Match" = String, Header, description = "The ETag of the version to change")),
    responses((status = 200, description = "The product", body = ProductView)))]
async fn change(
    _: Operator,
    State(catalogue): State<Catalogue>,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    IfMatch(version): IfMatch,
    Json(change): Json<ProductChange>,
) -> Result<Response, Problem> {
    let change = change.check()?;
    let changed = catalogue
        .change(ProductId(id), version, change, clock::now())
        .await?;
    let product = done(changed)?;
    let (etag, body) = with_stock(&shop, &product)
        .await
        .map_err(Problem::internal)?;
    Ok(([(ETAG, etag), JSON], body).into_response())
}

/// Remove a product
///
/// Only one that no sale refers to.
#[utoipa::path(delete, path = "/v1/products/{id}", tag = "products",
    params(("id" = Uuid, Path), ("If-Match" = String, Header, description = "The ETag of the version to remove")),
    responses((status = 204, description = "It is gone")))]
async fn remove(
    _: Operator,
    State(catalogue): State<Catalogue>,
    Path(id): Path<Uuid>,
    IfMatch(version): IfMatch,
) -> Result<StatusCode, Problem> {
    done(catalogue.remove(ProductId(id), version).await?)?;
    Ok(StatusCode::NO_CONTENT)
}

fn done<T>(changed: Changed<T>) -> Result<T, Problem> {
    match changed {
        Changed::Done(value) => Ok(value),
        Changed::Missing => Err(Problem::not_found()),
        Changed::Stale => Err(stale()),
        Changed::InUse => Err(Problem::new(
            Code::Conflict,
            "A sale refers to this product.",
        )),
        Changed::SkuTaken => Err(sku_taken()),
        Changed::OtherImages => {
            let detail = "must be the ids of all images of the product, each once";
            Err(Problem::out_of_range(vec![FieldError::new(
                "#/images", detail,
            )]))
        }
    }
}

fn sku_taken() -> Problem {
    Problem::new(Code::Conflict, "Another product has this SKU.")
}

/// As PostgreSQL checks it, too.
fn is_sku(text: &str) -> bool {
    SKU_BYTES.contains(&text.len())
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte))
}

fn check_sku(check: &mut Check, sku: &str) -> String {
    if !is_sku(sku) {
        let detail =
            "must be 1 to 64 letters, digits, '.', '_', '/' or '-', a letter or digit first";
        check.refuse("#/sku", detail);
    }
    sku.to_owned()
}

impl ProductQuery {
    fn check(self, page: &Pagination<After>) -> Result<Search, Problem> {
        let sort = match self.sort.unwrap_or_default() {
            SortBy::Name => Sort::Name,
            SortBy::Price => Sort::Price,
            SortBy::CreatedAt => Sort::CreatedAt,
        };
        let descending = self.order.unwrap_or_default() == Direction::Desc;
        let elsewhere = |after: &After| !after.stands_in(sort, descending);
        if page.after.as_ref().is_some_and(elsewhere) {
            return Err(Pagination::<After>::bad_cursor());
        }
        let words = self.q.filter(|q| !q.trim().is_empty());
        if words.as_ref().is_some_and(|q| {
            q.chars().count() > SEARCH_CHARACTERS_MAX
                || q.split_whitespace().count() > SEARCH_WORDS_MAX
        }) {
            return Err(Problem::unreadable(
                "#/query/q",
                "must be at most 10 words of 200 characters together",
            ));
        }
        if self.sku.as_deref().is_some_and(|sku| !is_sku(sku)) {
            return Err(Problem::unreadable("#/query/sku", "must be a SKU"));
        }
        for (pointer, price) in [
            ("#/query/price_min", self.price_min),
            ("#/query/price_max", self.price_max),
        ] {
            if price.is_some_and(|price| price < 0) {
                return Err(Problem::unreadable(pointer, "must not be negative"));
            }
        }
        if let (Some(min), Some(max)) = (self.price_min, self.price_max)
            && min > max
        {
            let detail = "must not be less than price_min";
            return Err(Problem::unreadable("#/query/price_max", detail));
        }
        let currency = self.currency.as_deref().map(Currency::parse).transpose();
        currency.map_err(|error| Problem::unreadable("#/query/currency", error.to_string()))?;
        Ok(Search {
            words: words.map(|q| q.split_whitespace().collect::<Vec<_>>().join(" ")),
            sku: self.sku,
            price_min: self.price_min,
            price_max: self.price_max,
            currency: self.currency,
            // The end of the second, so that all who ask within one share the answer; whether what
            // opens by then is open yet, Redis says.
            on_sale: self.on_sale.map(|wanted| {
                (
                    wanted,
                    clock::now().trunc_subsecs(0) + TimeDelta::seconds(1),
                )
            }),
            sort,
            descending,
            after: page.after.clone(),
            limit: page.rows(),
        })
    }
}

impl NewProduct {
    fn check(&self) -> Result<Content, Problem> {
        let mut check = Check::new();
        let name = check.text("#/name", &self.name, NAME_CHARACTERS);
        let description = check.text("#/description", &self.description, DESCRIPTION_CHARACTERS);
        let sku = self.sku.as_ref().map(|sku| check_sku(&mut check, sku));
        let price = check.price("#/price", &self.price);
        let price = check.done_with(price)?;
        Ok(Content {
            name,
            description,
            sku,
            price,
        })
    }
}

impl ProductChange {
    fn check(&self) -> Result<Change, Problem> {
        let mut check = Check::new();
        let change = Change {
            name: self
                .name
                .as_ref()
                .map(|name| check.text("#/name", name, NAME_CHARACTERS)),
            description: self
                .description
                .as_ref()
                .map(|text| check.text("#/description", text, DESCRIPTION_CHARACTERS)),
            price: self
                .price
                .as_ref()
                .and_then(|price| check.price("#/price", price)),
            sku: self
                .sku
                .as_ref()
                .map(|sku| sku.as_ref().map(|sku| check_sku(&mut check, sku))),
            images: self.images.clone(),
        };
        if change
            .images
            .as_ref()
            .is_some_and(|images| images.len() > IMAGES_MAX)
        {
            check.refuse("#/images", "must be at most 8");
        }
        check.done().map(|()| change)
    }
}
