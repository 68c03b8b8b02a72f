//! What is kept about a person: shown to that person, and erased.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::Json,
    caller::Person,
    check::{Timestamp, present},
    problem::{Code, Problem},
    routes::{Access, Noted, Routes},
};
use crate::{
    auth::accounts::Accounts,
    domain::id::BuyerId,
    sales::Shop,
    store::{personal::Erased, users::User},
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Person, routes!(export), &[Code::NotFound])
        .noting(Noted::All)
        .add(
            Access::Person,
            routes!(erase),
            &[Code::InvalidCredentials, Code::Conflict, Code::NotFound],
        )
}

/// Everything that is kept about a user. At most 10,000 of each kind, the latest: lists have all.
#[derive(Serialize, ToSchema)]
struct Export {
    id: Uuid,
    /// Null for a user of another identity provider.
    #[schema(inline)]
    account: Option<Account>,
    /// `profile`, `sessions`, `api_keys`, `cart`, `checkouts`, `orders`, `payments`, `waitlist`.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    kept: Value,
}

/// What a user has registered with.
#[derive(Serialize, ToSchema)]
struct Account {
    email: String,
    name: String,
    role: String,
    created_at: Timestamp,
}

impl From<User> for Account {
    fn from(user: User) -> Self {
        Self {
            email: user.email,
            name: user.name,
            role: user.role,
            created_at: Timestamp(user.created_at),
        }
    }
}

/// What proves that it is oneself who wants to be forgotten.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Erasure {
    /// The present one; absent for a user of another identity provider.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, example = "correct horse battery staple")]
    password: Option<String>,
}

/// What is kept about me
#[utoipa::path(get, path = "/v1/me/export", tag = "accounts",
    responses((status = 200, description = "Everything", body = Export)))]
async fn export(
    Person(caller): Person,
    State(accounts): State<Accounts>,
) -> Result<axum::Json<Export>, Problem> {
    let kept = accounts.personal.export(caller.user).await;
    let kept = kept.map_err(|error| Problem::from(error).of_reading())?;
    let kept = kept.ok_or_else(Problem::not_found)?;
    let account = accounts.users.by_id(caller.user).await?;
    Ok(axum::Json(Export {
        id: caller.user,
        account: account.map(Account::from),
        kept,
    }))
}

/// Forget me
///
/// Address, name, password, sessions, API keys, cart, places in line and what I am called in public go,
/// for good.
/// What I bought stays, under an id that points to nobody: totals and places are as before. Not while
/// an order waits for its payment or money is on its way.
#[utoipa::path(delete, path = "/v1/me", tag = "accounts", request_body = Erasure,
    responses((status = 204, description = "Forgotten")))]
async fn erase(
    Person(caller): Person,
    State(accounts): State<Accounts>,
    State(shop): State<Arc<Shop>>,
    Json(erasure): Json<Erasure>,
) -> Result<StatusCode, Problem> {
    let done = accounts
        .erase_oneself(caller.user, erasure.password)
        .await?;
    erased(&shop, caller.user, &done).await
}

/// What became of it, as an answer. Whoever is forgotten waits in no line.
pub(super) async fn erased(
    shop: &Arc<Shop>,
    user: Uuid,
    erased: &Erased,
) -> Result<StatusCode, Problem> {
    let why = match erased {
        Erased::Done(_) => {
            shop.leave_all_lines(BuyerId(user)).await;
            return Ok(StatusCode::NO_CONTENT);
        }
        Erased::Missing => return Err(Problem::not_found()),
        Erased::Holds => "Orders wait for their payment: pay or cancel them first.",
        Erased::Owed => "A payment or a refund is under way: try again when it is done.",
    };
    Err(Problem::new(Code::Conflict, why))
}
