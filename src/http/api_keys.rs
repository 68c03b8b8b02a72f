//! API keys: made, shown once, listed, revoked by the user for whom they act.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Path},
    caller::Person,
    check::{Check, Timestamp, present},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    auth::api_key::{ApiKeys, KeyError, PER_USER_MAX, Scope},
    clock,
    store::api_keys::ApiKeyRow,
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Person, routes!(make), &[Code::Conflict])
        .add(Access::Person, routes!(list), &[])
        .add(Access::Person, routes!(revoke), &[Code::NotFound])
}

/// A key for a machine.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct KeyOrder {
    /// What it is for.
    #[schema(example = "Warehouse", min_length = 1, max_length = 100)]
    name: String,
    /// What it may do of what I may.
    #[schema(min_items = 1, example = json!(["read", "buy"]))]
    scopes: Vec<Scope>,
    /// When it ends; it holds until it is revoked if this is absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, format = DateTime, required = false)]
    expires_at: Option<Timestamp>,
}

/// A key, without what makes it one.
#[derive(Serialize, ToSchema)]
struct KeyView {
    id: Uuid,
    name: String,
    scopes: Vec<Scope>,
    created_at: Timestamp,
    expires_at: Option<Timestamp>,
    /// To the minute; null if it was never used.
    last_used_at: Option<Timestamp>,
}

impl From<ApiKeyRow> for KeyView {
    fn from(row: ApiKeyRow) -> Self {
        Self {
            id: row.id,
            name: row.name,
            scopes: row
                .scopes
                .iter()
                .filter_map(|word| Scope::parse(word))
                .collect(),
            created_at: Timestamp(row.created_at),
            expires_at: row.expires_at.map(Timestamp),
            last_used_at: row.last_used_at.map(Timestamp),
        }
    }
}

/// A key that was made.
#[derive(Serialize, ToSchema)]
struct KeyMade {
    #[serde(flatten)]
    view: KeyView,
    /// Send it as `Authorization: Bearer …`. It is shown this once.
    #[schema(example = "sk_stockade_…")]
    key: String,
}

/// My keys.
#[derive(Serialize, ToSchema)]
struct Keys {
    data: Vec<KeyView>,
}

impl From<KeyError> for Problem {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::Full => {
                let detail = format!("There are {PER_USER_MAX} keys already: revoke one first.");
                Self::new(Code::Conflict, detail)
            }
            KeyError::NoUser => {
                let detail = "API keys are for users who are registered here.";
                Self::new(Code::Conflict, detail)
            }
            KeyError::Store(error) => error.into(),
            KeyError::Random(error) => Self::internal(error),
        }
    }
}

/// Make an API key
///
/// For a machine that acts for me, with the `scopes` that it needs: `read` to look, `buy` to change
/// what is mine, `operate` for what operators do. A scope never widens my role, and no key manages
/// accounts. 20 keys at most.
#[utoipa::path(post, path = "/v1/me/api-keys", tag = "api_keys", request_body = KeyOrder,
    responses((status = 201, description = "The key", body = KeyMade)))]
async fn make(
    Person(identity): Person,
    State(keys): State<Arc<ApiKeys>>,
    Json(order): Json<KeyOrder>,
) -> Result<(StatusCode, axum::Json<KeyMade>), Problem> {
    let mut check = Check::new();
    let name = check.text("#/name", &order.name, 1..=100);
    let mut scopes = order.scopes;
    scopes.sort_unstable();
    scopes.dedup();
    if scopes.is_empty() {
        check.refuse("#/scopes", "must name at least one");
    }
    if scopes.contains(&Scope::Operate) && !identity.role.operates() {
        check.refuse("#/scopes", "must not have `operate`: you are no operator");
    }
    if let Some(expires_at) = order.expires_at {
        check.instant("#/expires_at", expires_at);
        if expires_at.0 <= clock::now() {
            check.refuse("#/expires_at", "must lie in the future");
        }
    }
    check.done()?;
    let expires_at = order.expires_at.map(|at| at.0);
    let made = keys.make(identity.user, name, &scopes, expires_at).await?;
    let body = KeyMade {
        view: made.row.into(),
        key: made.text,
    };
    Ok((StatusCode::CREATED, axum::Json(body)))
}

/// List my API keys
///
/// Newest first, all of them.
#[utoipa::path(get, path = "/v1/me/api-keys", tag = "api_keys",
    responses((status = 200, description = "The keys", body = Keys)))]
async fn list(
    Person(identity): Person,
    State(keys): State<Arc<ApiKeys>>,
) -> Result<axum::Json<Keys>, Problem> {
    let rows = keys.of_user(identity.user).await;
    let rows = rows.map_err(|error| Problem::from(error).of_reading())?;
    let data = rows.into_iter().map(KeyView::from).collect();
    Ok(axum::Json(Keys { data }))
}

/// Revoke an API key
///
/// The node that is asked refuses it at once, the others within a minute.
#[utoipa::path(delete, path = "/v1/me/api-keys/{id}", tag = "api_keys",
    params(("id" = Uuid, Path)),
    responses((status = 204, description = "It is revoked")))]
async fn revoke(
    Person(identity): Person,
    State(keys): State<Arc<ApiKeys>>,
    Path(id): Path<Uuid>,
) -> Result<StatusCode, Problem> {
    if keys.revoke(identity.user, id).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(Problem::not_found())
    }
}
