//! `az://container/prefix`: Azure Blob Storage, set by `AZURE_*`.

use std::collections::BTreeMap;

use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::ClientConfigKey;

use super::{Backend, Place, Service as _};

pub(super) fn open(place: Place, options: &BTreeMap<String, String>) -> Result<Backend, String> {
    let builder = MicrosoftAzureBuilder::from_env()
        .with_container_name(&place.bucket)
        .with_options(options)?;
    let value = |key| builder.get_config_value(&key);
    let is_on = |key| value(key).as_deref() == Some("true");
    let is_emulated = is_on(AzureConfigKey::UseEmulator);
    if !is_emulated && value(AzureConfigKey::AccountName).is_none() {
        return Err("AZURE_STORAGE_ACCOUNT_NAME is not set".to_owned());
    }
    let plain_http = is_emulated
        || value(AzureConfigKey::Endpoint).is_some_and(|endpoint| endpoint.starts_with("http://"));
    let allow_http = AzureConfigKey::Client(ClientConfigKey::AllowHttp);
    if plain_http && !is_emulated && !is_on(allow_http) {
        return Err(
            "AZURE_ENDPOINT is plain http://, which needs AZURE_ALLOW_HTTP=true".to_owned(),
        );
    }
    let has_credentials = is_emulated
        || is_on(AzureConfigKey::SkipSignature)
        || is_on(AzureConfigKey::UseAzureCli)
        || [
            AzureConfigKey::AccessKey,
            AzureConfigKey::SasKey,
            AzureConfigKey::Token,
            AzureConfigKey::ClientSecret,
            AzureConfigKey::FederatedTokenFile,
        ]
        .into_iter()
        .any(|key| value(key).is_some());
    let suspicion = (!has_credentials)
        .then_some("neither AZURE_STORAGE_ACCOUNT_KEY nor another source of credentials is set");
    place.backend(&builder, plain_http, suspicion)
}
