//! Registering, logging in, staying logged in, leaving, and who one is.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::Json,
    caller::{Caller, Person, actor},
    check::{Check, Timestamp, present},
    limit::Asker,
    problem::{Code, FieldError, Problem},
    routes::{Access, Noted, Routes},
    sessions,
};
use crate::{
    auth::{
        Role,
        accounts::{AccountError, Accounts, Grant},
        email::Email,
        password::{self, HashError},
        token::Identity,
    },
    domain::id::BuyerId,
    ops::audit_log::AuditTrail,
    sales::Shop,
    store::{audit_log::Origin, profiles::Profile, users::User},
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Anyone, routes!(register), &[Code::EmailTaken])
        .add(Access::Anyone, routes!(login), &[Code::InvalidCredentials])
        .add(
            Access::Anyone,
            routes!(refresh),
            &[Code::InvalidCredentials],
        )
        // Everybody who is logged in does so all the time.
        .noting(Noted::Refused)
        .add(Access::Anyone, routes!(logout), &[])
        .add(Access::Caller, routes!(me), &[])
        .add(Access::Person, routes!(change), &[])
}

/// A new user.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Registration {
    /// Capitals and spaces around it do not matter.
    #[schema(example = "ada@example.org", max_length = 254)]
    email: String,
    /// At least 8 characters, at most 72 bytes, and not among the first that anybody would guess.
    #[schema(
        example = "correct horse battery staple",
        min_length = 8,
        max_length = 72
    )]
    password: String,
    /// What to call the user.
    #[schema(example = "Ada", min_length = 1, max_length = 100)]
    name: String,
}

/// What proves to be a user.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Login {
    #[schema(example = "ada@example.org")]
    email: String,
    #[schema(example = "correct horse battery staple")]
    password: String,
}

/// What proves to hold a session.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Refresh {
    refresh_token: String,
}

/// A pair of tokens.
#[derive(Serialize, ToSchema)]
struct Tokens {
    /// Send it as `Authorization: Bearer …`.
    access_token: String,
    #[schema(example = "Bearer")]
    token_type: &'static str,
    /// Seconds until the access token expires.
    #[schema(example = 600)]
    expires_in: u32,
    /// Gets the next pair, once.
    refresh_token: String,
}

impl From<Grant> for Tokens {
    fn from(grant: Grant) -> Self {
        Self {
            access_token: grant.access_token,
            token_type: "Bearer",
            expires_in: grant.expires_in,
            refresh_token: grant.refresh_token,
        }
    }
}

/// A user, as seen by that user.
#[derive(Serialize, ToSchema)]
struct Me {
    id: Uuid,
    /// Null for a user of another identity provider.
    email: Option<String>,
    /// Null for a user of another identity provider.
    name: Option<String>,
    role: Role,
    /// Null for a user of another identity provider.
    created_at: Option<Timestamp>,
    /// What to be called in public.
    display_name: Option<String>,
    /// Whether leaderboards show `display_name`.
    show_on_leaderboards: bool,
}

/// What to change about oneself; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct MeChange {
    /// What to be called in public.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, example = "Ada", min_length = 1, max_length = 40)]
    display_name: Option<String>,
    /// Whether leaderboards show `display_name`. They do not, unless this says so.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = bool, required = false)]
    show_on_leaderboards: Option<bool>,
}

impl Me {
    fn registered(user: User, role: Role) -> Self {
        Self {
            id: user.id,
            email: Some(user.email),
            name: Some(user.name),
            role,
            created_at: Some(Timestamp(user.created_at)),
            display_name: None,
            show_on_leaderboards: false,
        }
    }

    fn called(self, profile: Profile) -> Self {
        Self {
            display_name: profile.display_name,
            show_on_leaderboards: profile.show_on_leaderboards,
            ..self
        }
    }
}

impl From<AccountError> for Problem {
    fn from(error: AccountError) -> Self {
        match error {
            AccountError::EmailTaken => Self::new(
                Code::EmailTaken,
                "Somebody has registered with this e-mail address.",
            ),
            AccountError::InvalidCredentials => {
                Self::new(Code::InvalidCredentials, "The credentials are not valid.")
            }
            AccountError::Hash(HashError::Busy) => {
                Self::unavailable("Too many passwords are waiting to be checked.")
            }
            AccountError::Store(error) => error.into(),
            AccountError::Hash(HashError::Bcrypt(_) | HashError::Thread(_))
            | AccountError::Sign(_)
            | AccountError::Random(_)
            | AccountError::Role(_) => Self::internal(error),
        }
    }
}

/// Register
///
/// Adds a buyer. The role never comes from the body.
#[utoipa::path(post, path = "/v1/auth/register", tag = "accounts", request_body = Registration,
    responses((status = 201, description = "The user", body = Me)))]
async fn register(
    State(accounts): State<Accounts>,
    Json(registration): Json<Registration>,
) -> Result<(StatusCode, axum::Json<Me>), Problem> {
    let mut check = Check::new();
    let name = check.text("#/name", &registration.name, 1..=100);
    if let Err(weakness) = password::check(&registration.password) {
        check.refuse("#/password", weakness.to_string());
    }
    let email = Email::parse(&registration.email);
    if email.is_none() {
        check.refuse("#/email", "must be an e-mail address");
    }
    let email = check.done_with(email)?;
    let user = accounts
        .register(email, name, registration.password, Role::Buyer)
        .await?;
    Ok((
        StatusCode::CREATED,
        axum::Json(Me::registered(user, Role::Buyer)),
    ))
}

/// Log in
#[utoipa::path(post, path = "/v1/auth/login", tag = "accounts", request_body = Login,
    responses((status = 200, description = "A pair of tokens", body = Tokens)))]
async fn login(
    State(accounts): State<Accounts>,
    State(trail): State<AuditTrail>,
    asker: Asker,
    headers: HeaderMap,
    Json(login): Json<Login>,
) -> Result<axum::Json<Tokens>, Problem> {
    let name = sessions::user_agent(&headers);
    if let Some(email) = Email::parse(&login.email) {
        Origin::concerns(|| trail.account(email.as_str()));
    }
    asker.throttle.login(&login.email, asker.address).await?;
    let grant = accounts.login(&login.email, login.password, name).await?;
    Origin::acts(|| actor(&grant.identity));
    asker.throttle.logged_in(&login.email, asker.address);
    Ok(axum::Json(grant.into()))
}

/// Get the next pair of tokens
///
/// A refresh token works once. Using it again ends its session, unless it is within ten seconds
/// and nobody has gone on: then it is a retry, and gets the same successor.
#[utoipa::path(post, path = "/v1/auth/refresh", tag = "accounts", request_body = Refresh,
    responses((status = 200, description = "A pair of tokens", body = Tokens)))]
async fn refresh(
    State(accounts): State<Accounts>,
    Json(refresh): Json<Refresh>,
) -> Result<axum::Json<Tokens>, Problem> {
    let grant = accounts.refresh(&refresh.refresh_token).await?;
    Ok(axum::Json(grant.into()))
}

/// Log out
///
/// Ends the session of a refresh token; one that is unknown has none to end.
#[utoipa::path(post, path = "/v1/auth/logout", tag = "accounts", request_body = Refresh,
    responses((status = 204, description = "The session has ended")))]
async fn logout(
    State(accounts): State<Accounts>,
    Json(refresh): Json<Refresh>,
) -> Result<StatusCode, Problem> {
    accounts.logout(&refresh.refresh_token).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Who am I
#[utoipa::path(get, path = "/v1/me", tag = "accounts",
    responses((status = 200, description = "The user of the token", body = Me)))]
async fn me(
    Caller(identity): Caller,
    State(accounts): State<Accounts>,
    State(shop): State<Arc<Shop>>,
) -> Result<axum::Json<Me>, Problem> {
    let profile = shop.names.profile(BuyerId(identity.user)).await?;
    Ok(axum::Json(who(&accounts, identity).await?.called(profile)))
}

/// Change how I am shown
///
/// Leaderboards show a pseudonym, and a name only if its buyer wants that. Taking it back takes
/// effect at once on the node that is asked, within a second on others.
#[utoipa::path(patch, path = "/v1/me", tag = "accounts", request_body = MeChange,
    responses((status = 200, description = "The user of the token", body = Me)))]
async fn change(
    Person(identity): Person,
    State(accounts): State<Accounts>,
    State(shop): State<Arc<Shop>>,
    Json(change): Json<MeChange>,
) -> Result<axum::Json<Me>, Problem> {
    let mut check = Check::new();
    let name = change.display_name.map(|name| {
        // It stands in a line among others, and must not rearrange them.
        let strange = |c: char| {
            c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
        };
        let name = name.trim();
        if name.contains(strange) {
            check.refuse("#/display_name", "must not contain invisible characters");
        }
        check.text("#/display_name", name, 1..=40)
    });
    check.done()?;
    let buyer = BuyerId(identity.user);
    let changed = shop.names.change(buyer, name, change.show_on_leaderboards);
    let Some(profile) = changed.await? else {
        let detail = "is needed to be shown";
        return Err(Problem::out_of_range(vec![FieldError::new(
            "#/display_name",
            detail,
        )]));
    };
    Ok(axum::Json(who(&accounts, identity).await?.called(profile)))
}

async fn who(accounts: &Accounts, identity: Identity) -> Result<Me, Problem> {
    Ok(match accounts.users.by_id(identity.user).await? {
        Some(user) => Me::registered(user, identity.role),
        None => Me {
            id: identity.user,
            email: None,
            name: None,
            role: identity.role,
            created_at: None,
            display_name: None,
            show_on_leaderboards: false,
        },
    })
}
