//! Users as admins see them: who there is, what they may do, and who may do nothing any more.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Nothing, Path, Query},
    caller::Admin,
    check::{Timestamp, present},
    page::{Page, Pagination},
    personal,
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    auth::{Role, accounts::Accounts, email::Email},
    sales::Shop,
    store::users::{ManagedUser, UserChange, UserFilter},
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Admin, routes!(list), &[Code::Validation])
        .add(
            Access::Admin,
            routes!(change),
            &[Code::NotFound, Code::Conflict],
        )
        .add(
            Access::Admin,
            routes!(erase),
            &[Code::NotFound, Code::Conflict],
        )
}

/// Which users.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct UserQuery {
    /// The one with this address.
    email: Option<String>,
    /// Those with this role.
    role: Option<Role>,
    /// Entries on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// A user, as seen by admins.
#[derive(Serialize, ToSchema)]
struct UserView {
    id: Uuid,
    email: String,
    name: String,
    role: Role,
    created_at: Timestamp,
    /// Since when the user may do nothing; null if the user may.
    disabled_at: Option<Timestamp>,
}

impl TryFrom<ManagedUser> for UserView {
    type Error = Problem;

    fn try_from(user: ManagedUser) -> Result<Self, Problem> {
        let role = Role::parse(&user.role);
        Ok(Self {
            role: role.ok_or_else(|| Problem::internal("a user has an unknown role"))?,
            id: user.id,
            email: user.email,
            name: user.name,
            created_at: Timestamp(user.created_at),
            disabled_at: user.disabled_at.map(Timestamp),
        })
    }
}

/// What to change about a user; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct UserPatch {
    /// Another one ends the user's sessions: the next login has it.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Role, required = false)]
    role: Option<Role>,
    /// `true` ends the user's sessions and API keys, and lets nobody log in.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = bool, required = false)]
    disabled: Option<bool>,
}

/// List users
///
/// Newest first; those who have registered here.
#[utoipa::path(get, path = "/v1/users", tag = "users", params(UserQuery),
    responses((status = 200, description = "A page", body = Page<UserView>)))]
async fn list(
    _: Admin,
    State(accounts): State<Accounts>,
    Query(query): Query<UserQuery>,
) -> Result<axum::Json<Page<UserView>>, Problem> {
    let page = Pagination::<Uuid>::read(query.limit, query.cursor.as_deref())?;
    let email = match query.email.as_deref().map(Email::parse) {
        Some(None) => {
            let detail = "must be an e-mail address";
            return Err(Problem::unreadable("#/query/email", detail));
        }
        Some(Some(email)) => Some(email.as_str().to_owned()),
        None => None,
    };
    let filter = UserFilter {
        email,
        role: query.role.map(Role::as_str),
    };
    let rows = accounts.users.list(filter, page.after, page.rows()).await;
    let rows = rows.map_err(|error| Problem::from(error).of_reading())?;
    let views = page.page(rows, |user| user.id, UserView::try_from);
    Ok(axum::Json(views.all()?))
}

/// Change a user
///
/// An admin does not change itself, so that one is always left; `stockade user` on the server can.
#[utoipa::path(patch, path = "/v1/users/{id}", tag = "users", request_body = UserPatch,
    params(("id" = Uuid, Path)),
    responses((status = 200, description = "The user", body = UserView)))]
async fn change(
    Admin(admin): Admin,
    State(accounts): State<Accounts>,
    Path(id): Path<Uuid>,
    Json(patch): Json<UserPatch>,
) -> Result<axum::Json<UserView>, Problem> {
    if id == admin.user {
        let detail = "An admin does not change itself: ask another one.";
        return Err(Problem::new(Code::Conflict, detail));
    }
    let change = UserChange {
        role: patch.role.map(Role::as_str),
        disabled: patch.disabled,
    };
    let user = accounts.manage(id, change).await?;
    let user = user.ok_or_else(Problem::not_found)?;
    Ok(axum::Json(user.try_into()?))
}

/// Forget a user
///
/// What `DELETE /v1/me` does, for somebody who cannot do it.
#[utoipa::path(post, path = "/v1/users/{id}/erase", tag = "users", params(("id" = Uuid, Path)),
    responses((status = 204, description = "Forgotten")))]
async fn erase(
    _: Admin,
    State(accounts): State<Accounts>,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<StatusCode, Problem> {
    personal::erased(&shop, id, &accounts.erase(id).await?).await
}
