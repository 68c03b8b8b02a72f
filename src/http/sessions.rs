//! Sessions as their user sees them, and what ends them: one by one, all at once, another password.

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode, header::USER_AGENT},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Nothing, Path, Query},
    caller::Person,
    check::{Check, Timestamp},
    page::{Page, PageQuery, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    auth::{accounts::Accounts, password, session::LIMITS},
    store::sessions::Session,
};

/// Characters of a client's name that are kept.
const USER_AGENT_CHARACTERS_MAX: usize = 200;

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Person, routes!(list), &[Code::Validation])
        .add(Access::Person, routes!(end), &[Code::NotFound])
        .add(Access::Person, routes!(logout_all), &[])
        .add(
            Access::Person,
            routes!(change_password),
            &[Code::InvalidCredentials],
        )
}

/// A login that lasts.
#[derive(Serialize, ToSchema)]
struct SessionView {
    id: Uuid,
    /// When it began, with a password.
    created_at: Timestamp,
    /// When tokens were last refreshed.
    last_used_at: Timestamp,
    /// When it ends unless it is used before.
    expires_at: Timestamp,
    /// What the client called itself when it logged in, shortened. It may have lied.
    #[schema(example = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0")]
    user_agent: Option<String>,
    /// Whether the access token of this request belongs to it.
    current: bool,
}

impl SessionView {
    fn new(session: Session, current: Option<Uuid>) -> Self {
        Self {
            id: session.id,
            created_at: Timestamp(session.created_at),
            last_used_at: Timestamp(session.last_used_at),
            expires_at: Timestamp(session.expires_at.min(session.last_used_at + LIMITS.idle)),
            user_agent: session.user_agent,
            current: current == Some(session.id),
        }
    }
}

/// A password, and the one that takes its place.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PasswordChange {
    #[schema(example = "correct horse battery staple")]
    old_password: String,
    /// At least 8 characters, at most 72 bytes, and not among the first that anybody would guess.
    #[schema(
        example = "another horse, another staple",
        min_length = 8,
        max_length = 72
    )]
    new_password: String,
}

/// What a client calls itself, as far as it is kept.
pub(super) fn user_agent(headers: &HeaderMap) -> Option<String> {
    let text = String::from_utf8_lossy(headers.get(USER_AGENT)?.as_bytes());
    let kept: String = text
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(USER_AGENT_CHARACTERS_MAX)
        .collect();
    Some(kept).filter(|kept| !kept.is_empty())
}

/// List my sessions
///
/// Those that last, newest first. One that is not used for seven days ends, and each ends after
/// thirty.
#[utoipa::path(get, path = "/v1/me/sessions", tag = "sessions", params(PageQuery),
    responses((status = 200, description = "A page", body = Page<SessionView>)))]
async fn list(
    Person(identity): Person,
    State(accounts): State<Accounts>,
    Query(query): Query<PageQuery>,
) -> Result<axum::Json<Page<SessionView>>, Problem> {
    let page = Pagination::<Uuid>::read(query.limit, query.cursor.as_deref())?;
    let rows = accounts.sessions(identity.user, page.after, page.rows());
    let rows = rows
        .await
        .map_err(|error| Problem::from(error).of_reading())?;
    let view = |session| SessionView::new(session, identity.session);
    Ok(axum::Json(page.page(rows, |session| session.id, view)))
}

/// End a session
///
/// Its refresh token is refused from now on. Its access token is refused at once by the node that
/// is asked, and within a minute by the others.
#[utoipa::path(delete, path = "/v1/me/sessions/{id}", tag = "sessions",
    params(("id" = Uuid, Path)),
    responses((status = 204, description = "It has ended")))]
async fn end(
    Person(identity): Person,
    State(accounts): State<Accounts>,
    Path(id): Path<Uuid>,
) -> Result<StatusCode, Problem> {
    if accounts.end_session(identity.user, id).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(Problem::not_found())
    }
}

/// Log out everywhere
///
/// Ends all my sessions, this one too. API keys stay.
#[utoipa::path(post, path = "/v1/auth/logout-all", tag = "sessions",
    responses((status = 204, description = "All sessions have ended")))]
async fn logout_all(
    Person(identity): Person,
    State(accounts): State<Accounts>,
    _: Option<Json<Nothing>>,
) -> Result<StatusCode, Problem> {
    accounts.logout_all(identity.user).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Change my password
///
/// Ends all my other sessions. API keys stay.
#[utoipa::path(post, path = "/v1/auth/password", tag = "sessions", request_body = PasswordChange,
    responses((status = 204, description = "The password has changed")))]
async fn change_password(
    Person(identity): Person,
    State(accounts): State<Accounts>,
    Json(change): Json<PasswordChange>,
) -> Result<StatusCode, Problem> {
    let mut check = Check::new();
    if let Err(weakness) = password::check(&change.new_password) {
        check.refuse("#/new_password", weakness.to_string());
    }
    check.done()?;
    accounts
        .change_password(identity, change.old_password, change.new_password)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_client_is_called_what_it_says_within_reason() {
        let named = |bytes: &[u8]| {
            let value = HeaderValue::from_bytes(bytes).unwrap();
            user_agent(&HeaderMap::from_iter([(USER_AGENT, value)]))
        };
        assert_eq!(named(b" curl/8 ").as_deref(), Some("curl/8"));
        assert_eq!(named(b"a\tb").as_deref(), Some("ab"));
        assert_eq!(named(b"\xff").as_deref(), Some("\u{fffd}"));
        assert_eq!(named(b" "), None);
        assert_eq!(user_agent(&HeaderMap::new()), None);
        assert_eq!(named(&[b'x'; 4_000]).unwrap().len(), 200);
    }
}
