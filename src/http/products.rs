//! The catalogue.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{ETAG, LOCATION},
    },
    response::{IntoResponse, Response},
};
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
    problem::{Code, Problem},
    routes::{Access, Routes},
    version::{IfMatch, etag, live_etag, stale, unchanged},
};
use crate::{
    clock,
    domain::{
        id::{OperationId, ProductId},
        round,
    },
    sales::{SaleView, Shop},
    store::products::{Added, After, Change, Changed, Content, Product, Products, Search, Sort},
};

const NAME_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=200;
const DESCRIPTION_CHARACTERS: std::ops::RangeInclusive<usize> = 0..=4000;
const SEARCH_CHARACTERS_MAX: usize = 200;

/// How long the catalogue waits for its stock.
const STOCK_TIMEOUT: Duration = Duration::from_millis(500);

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Anyone, routes!(list), &[Code::Validation])
        .add(Access::Anyone, routes!(get), &[Code::NotFound])
        .add(
            Access::Operator,
            routes!(create),
            &[Code::IdempotencyKeyMismatch],
        )
        .add(
            Access::Operator,
            routes!(change),
            &[
                Code::NotFound,
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
}

/// A product.
#[derive(Serialize, ToSchema)]
struct ProductView {
    id: Uuid,
    name: String,
    description: String,
    price: Price,
    /// Its open sale, if there is one.
    sale_id: Option<Uuid>,
    /// What is left in that sale.
    stock: Option<u64>,
    created_at: Timestamp,
    updated_at: Timestamp,
}

impl ProductView {
    fn new(product: Product, sale: Option<&SaleView>) -> Self {
        Self {
            id: product.id.0,
            name: product.content.name,
            description: product.content.description,
            price: product.content.price.into(),
            sale_id: sale.map(|sale| sale.facts.id.0),
            stock: sale.map(|sale| sale.standing.counters.remaining),
            created_at: Timestamp(product.created_at),
            updated_at: Timestamp(product.updated_at),
        }
    }
}

/// The open sales of some products. The catalogue does without when the engine does not answer.
async fn open_sales(shop: &Shop, products: Vec<ProductId>) -> HashMap<ProductId, SaleView> {
    let sales = tokio::time::timeout(STOCK_TIMEOUT, shop.open_sales(products)).await;
    let Ok(Ok(mut sales)) = sales else {
        tracing::debug!("the catalogue is shown without stock");
        return HashMap::new();
    };
    // PostgreSQL chose them, and it may be behind what Redis has said since.
    sales.retain(|_, sale| {
        matches!(
            sale.standing.state,
            round::State::Open | round::State::Paused
        )
    });
    sales
}

/// A product with its stock, and the `ETag` of both.
async fn with_stock(shop: &Shop, product: Product) -> (HeaderValue, ProductView) {
    let mut sales = open_sales(shop, vec![product.id]).await;
    let sale = sales.remove(&product.id);
    let etag = match sale {
        Some(_) => live_etag(product.version),
        None => etag(product.version),
    };
    (etag, ProductView::new(product, sale.as_ref()))
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
    /// Only products whose name or description contains this.
    #[param(max_length = 200)]
    q: Option<String>,
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
    responses((status = 200, description = "A page", body = Page<ProductView>)))]
async fn list(
    State(products): State<Products>,
    State(shop): State<Arc<Shop>>,
    Query(query): Query<ProductQuery>,
) -> Result<axum::Json<Page<ProductView>>, Problem> {
    let page = Pagination::<After>::read(query.limit, query.cursor.as_deref())?;
    let sort = match query.sort.unwrap_or_default() {
        SortBy::Name => Sort::Name,
        SortBy::Price => Sort::Price,
        SortBy::CreatedAt => Sort::CreatedAt,
    };
    let descending = query.order.unwrap_or_default() == Direction::Desc;
    if page
        .after
        .as_ref()
        .is_some_and(|after| !after.stands_in(sort, descending))
    {
        return Err(Pagination::<After>::bad_cursor());
    }
    let contains = query.q.filter(|q| !q.is_empty());
    if contains
        .as_ref()
        .is_some_and(|q| q.chars().count() > SEARCH_CHARACTERS_MAX || q.contains('\0'))
    {
        return Err(Problem::unreadable(
            "#/query/q",
            "must be at most 200 characters, without NUL",
        ));
    }
    let after = page.after.clone();
    let rows = products
        .search(Search {
            contains,
            sort,
            descending,
            after,
            limit: page.rows(),
        })
        .await?;
    let place = |product: &Product| After::product(product, sort, descending);
    let ids = rows.iter().map(|product| product.id).collect();
    let sales = open_sales(&shop, ids).await;
    let view = |product: Product| {
        let sale = sales.get(&product.id);
        ProductView::new(product, sale)
    };
    Ok(axum::Json(page.page(rows, place, view)))
}

/// Get a product
#[utoipa::path(get, path = "/v1/products/{id}", tag = "products", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The product", body = ProductView),
        (status = 304, description = "The client has it already"),
    ))]
async fn get(
    State(products): State<Products>,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let product = products
        .by_id(ProductId(id))
        .await?
        .ok_or_else(Problem::not_found)?;
    let (etag, view) = with_stock(&shop, product).await;
    // Stock moves by itself: what shows it is always sent again.
    if view.sale_id.is_none() && unchanged(&headers, &etag) {
        return Ok((StatusCode::NOT_MODIFIED, [(ETAG, etag)]).into_response());
    }
    Ok(([(ETAG, etag)], axum::Json(view)).into_response())
}

/// Add a product
///
/// With an `Idempotency-Key` a retry adds nothing and gets the first answer again.
#[utoipa::path(post, path = "/v1/products", tag = "products", request_body = NewProduct,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 201, description = "The product", body = ProductView)))]
async fn create(
    Operator(operator): Operator,
    State(products): State<Products>,
    State(shop): State<Arc<Shop>>,
    key: Option<IdempotencyKey>,
    Json(new): Json<NewProduct>,
) -> Result<Response, Problem> {
    let content = new.check()?;
    let id = match &key {
        Some(key) => OperationId::derive("products.create", operator.user, &key.0).0,
        None => clock::new_id(),
    };
    let (product, replayed) = match products
        .add(ProductId(id), &content, key.is_some(), clock::now())
        .await?
    {
        Added::New(product) => (product, None),
        Added::Replayed(product) => (product, Some([(IDEMPOTENCY_REPLAYED, REPLAYED)])),
        Added::Mismatch => {
            let detail = "This key has added another product.";
            return Err(Problem::new(Code::IdempotencyKeyMismatch, detail));
        }
    };
    // Hexadecimal digits and hyphens are always a header's value.
    let location =
        HeaderValue::from_str(&format!("/v1/products/{id}")).map_err(Problem::internal)?;
    let (etag, view) = with_stock(&shop, product).await;
    let headers = [(ETAG, etag), (LOCATION, location)];
    Ok((StatusCode::CREATED, headers, replayed, axum::Json(view)).into_response())
}

/// Change a product
#[utoipa::path(patch, path = "/v1/products/{id}", tag = "products", request_body = ProductChange,
    params(("id" = Uuid, Path), ("If-Match" = String, Header, description = "The ETag of the version to change")),
    responses((status = 200, description = "The product", body = ProductView)))]
async fn change(
    _: Operator,
    State(products): State<Products>,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    IfMatch(version): IfMatch,
    Json(change): Json<ProductChange>,
) -> Result<Response, Problem> {
    let change = change.check()?;
    let changed = products
        .change(ProductId(id), version, change, clock::now())
        .await?;
    let (etag, view) = with_stock(&shop, done(changed)?).await;
    Ok(([(ETAG, etag)], axum::Json(view)).into_response())
}

/// Remove a product
///
/// Only one that no sale refers to.
#[utoipa::path(delete, path = "/v1/products/{id}", tag = "products",
    params(("id" = Uuid, Path), ("If-Match" = String, Header, description = "The ETag of the version to remove")),
    responses((status = 204, description = "It is gone")))]
async fn remove(
    _: Operator,
    State(products): State<Products>,
    Path(id): Path<Uuid>,
    IfMatch(version): IfMatch,
) -> Result<StatusCode, Problem> {
    done(products.remove(ProductId(id), version).await?)?;
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
    }
}

impl NewProduct {
    fn check(&self) -> Result<Content, Problem> {
        let mut check = Check::new();
        let name = check.text("#/name", &self.name, NAME_CHARACTERS);
        let description = check.text("#/description", &self.description, DESCRIPTION_CHARACTERS);
        let price = check.price("#/price", &self.price);
        let price = check.done_with(price)?;
        Ok(Content {
            name,
            description,
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
        };
        check.done().map(|()| change)
    }
}
