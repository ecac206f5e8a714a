//! A service as Rust: the trait, its client, its server and its price list.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Attribute, Ident, Type};

use crate::parse::{Method, Returns, Service};
use crate::price::Price;

pub(crate) fn expand(service: &Service) -> TokenStream {
    let parts = [definition(service), client(service), server(service), price_list(service)];
    quote!(#(#parts)*)
}

/// A name that no argument can hide.
fn own(name: &str) -> Ident {
    Ident::new(name, Span::mixed_site())
}

fn client_name(service: &Service) -> Ident {
    format_ident!("{}Client", service.ident)
}

fn server_name(service: &Service) -> Ident {
    format_ident!("{}Server", service.ident)
}

/// The attributes that say something about a method wherever it stands.
fn carried(attributes: &[Attribute]) -> impl Iterator<Item = &Attribute> {
    attributes.iter().filter(|it| ["doc", "cfg", "deprecated"].iter().any(|name| it.path().is_ident(name)))
}

/// The trait, whose futures and streams are `Send`.
fn definition(service: &Service) -> TokenStream {
    let Service { attributes, visibility, ident, supertraits, .. } = service;
    let methods = service.methods.iter().map(|method| {
        let Method { attributes, ident, context, arguments, is_async, output, .. } = method;
        let (names, types): (Vec<_>, Vec<_>) = context.iter().chain(arguments).map(|(name, of)| (name, of)).unzip();
        let output = match (&method.returns, &method.error) {
            (Returns::Value(_), _) => quote!(#output),
            (Returns::Stream(_), None) => quote!(#output + ::core::marker::Send),
            (Returns::Stream(_), Some(error)) => {
                let value = stream_in_result(method);
                quote!(::core::result::Result<#value + ::core::marker::Send, #error>)
            }
        };
        let returned = match is_async {
            true => quote!(impl ::core::future::Future<Output = #output> + ::core::marker::Send),
            false => output,
        };
        let body = match &method.default {
            Some(body) if *is_async => quote!({ async move #body }),
            Some(body) => quote!(#body),
            None => quote!(;),
        };
        quote!(#(#attributes)* #[allow(clippy::manual_async_fn)] fn #ident(&self #(, #names: #types)*) -> #returned #body)
    });
    let bounds = supertraits.iter();
    quote! {
        #(#attributes)*
        #visibility trait #ident: #(#bounds +)* ::core::marker::Send + ::core::marker::Sync + 'static {
            #(#methods)*
        }
    }
}

/// The `impl Stream` inside a `Result`.
fn stream_in_result(method: &Method) -> TokenStream {
    let output: Type = syn::parse2(method.output.clone()).expect("it was parsed before");
    let Type::Path(path) = output else { unreachable!("a result is a path") };
    let last = path.path.segments.last().expect("a path has segments");
    let syn::PathArguments::AngleBracketed(arguments) = &last.arguments else { unreachable!("a result has types") };
    let first = arguments.args.first();
    quote!(#first)
}

/// A method's name, without what makes it no keyword.
fn plain_name(method: &Method) -> String {
    method.ident.to_string().trim_start_matches("r#").to_owned()
}

/// The constants of a method: all that is known of it, and its id.
fn method_consts(method: &Method) -> [Ident; 2] {
    // Prefixed, so that a method `name` does not hide the `NAME` of the client.
    ["METHOD", "ID"].map(|prefix| format_ident!("{prefix}_{}", plain_name(method).to_uppercase()))
}

/// The methods. They are the client's, since no constant of a generic type can be a pattern.
fn methods(service: &Service) -> impl Iterator<Item = TokenStream> {
    service.methods.iter().map(|method| {
        let (conditions, [named, id]) = (method.conditions().collect::<Vec<_>>(), method_consts(method));
        let (name, version, method_name) = (&service.name, service.version, plain_name(method));
        let idempotent = method.is_idempotent.then(|| quote!(.idempotent()));
        quote! {
            #(#conditions)*
            const #named: &'static ::tollway::rpc::Method =
                &::tollway::rpc::Method::of(#name, #version, #method_name)#idempotent;
            #(#conditions)*
            const #id: ::tollway::rpc::MethodId = Self::#named.id();
        }
    })
}

/// The fingerprint of the trait's text, if both sides compare it.
fn schema(service: &Service) -> TokenStream {
    if !service.is_checked {
        return quote!(::core::option::Option::None);
    }
    let mut signatures: Vec<String> = service.methods.iter().map(Method::signature).collect();
    // The order of the methods does not travel.
    signatures.sort();
    let text = signatures.join(";");
    quote!(::core::option::Option::Some(::tollway::__private::fingerprint(#text)))
}

fn client(service: &Service) -> TokenStream {
    let Service { visibility, ident, name, version, .. } = service;
    let schema = schema(service);
    let client = client_name(service);
    let docs =
        format!("A client of the service `{name}`, version {version}: calls the methods of [`{ident}`] at the peer.");
    let consts = methods(service);
    let methods = service.methods.iter().map(|method| {
        let (attributes, ident, [named, _]) = (carried(&method.attributes), &method.ident, method_consts(method));
        let names: Vec<_> = method.arguments.iter().map(|(name, _)| name).collect();
        let types = method.arguments.iter().map(|(_, of)| of);
        let value = match &method.returns {
            Returns::Value(of) => quote!(#of),
            Returns::Stream(item) => quote!(::tollway::rpc::Rx<#item>),
        };
        let error = match &method.error {
            Some(error) => quote!(#error),
            None => quote!(::tollway::rpc::NoError),
        };
        let shows = requires(method);
        quote! {
            #(#attributes)*
            pub fn #ident(&self #(, #names: #types)*) -> ::tollway::rpc::Call<'_, #value, #error> {
                #shows
                ::tollway::__private::call(&self.caller, Self::#named, &(#(#names,)*))
            }
        }
    });
    quote! {
        #[doc = #docs]
        #[derive(::core::clone::Clone, ::core::fmt::Debug)]
        #visibility struct #client {
            caller: ::tollway::rpc::Caller,
        }

        impl #client {
            #(#consts)*
            #(#methods)*
        }

        impl ::tollway::rpc::ServiceClient for #client {
            const NAME: &'static str = #name;
            const VERSION: u32 = #version;
            const SCHEMA: ::core::option::Option<u64> = #schema;
        }

        impl ::core::convert::From<::tollway::Connection> for #client {
            fn from(connection: ::tollway::Connection) -> Self {
                Self { caller: connection.into() }
            }
        }

        impl ::core::convert::From<::tollway::rpc::Caller> for #client {
            fn from(caller: ::tollway::rpc::Caller) -> Self {
                Self { caller }
            }
        }

        impl ::core::convert::AsRef<::tollway::rpc::Caller> for #client {
            fn as_ref(&self) -> &::tollway::rpc::Caller {
                &self.caller
            }
        }
    }
}

/// Assertions that what travels can travel, each at the type that it is about.
fn requires(method: &Method) -> TokenStream {
    let arguments = method
        .arguments
        .iter()
        .map(|(_, of)| quote_spanned!(of.span()=> let _ = ::tollway::__private::travels::<#of>;));
    let value = match &method.returns {
        Returns::Value(of) | Returns::Stream(of) => of,
    };
    let owned = std::iter::once(&**value)
        .chain(&method.error)
        .map(|of| quote_spanned!(of.span()=> let _ = ::tollway::__private::is_owned::<#of>;));
    quote!(#(#arguments)* #(#owned)*)
}

fn server(service: &Service) -> TokenStream {
    let Service { visibility, ident, name, version, .. } = service;
    let (server, implementor) = (server_name(service), own("T"));
    let docs = format!("The service `{name}`, version {version}: answers calls with a [`{ident}`].");
    let client = client_name(service);
    let arms = service.methods.iter().map(|method| {
        let (conditions, [_, id], handler) = (method.conditions(), method_consts(method), handler(service, method));
        quote!(#(#conditions)* #client::#id => #handler)
    });
    let names = service.methods.iter().map(|method| {
        let (conditions, [named, id]) = (method.conditions(), method_consts(method));
        quote!(#(#conditions)* #client::#id => ::core::option::Option::Some(#client::#named.name()),)
    });
    let call = own("call");
    quote! {
        #[doc = #docs]
        #visibility struct #server<#implementor> {
            service: ::std::sync::Arc<#implementor>,
            inline_within: ::core::option::Option<::core::time::Duration>,
        }

        impl<#implementor: #ident> #server<#implementor> {
            /// Serves this.
            pub fn new(service: #implementor) -> Self {
                Self::from(::std::sync::Arc::new(service))
            }

            /// How long a handler may take to count as short, see `Service::inline_within`; `None` for handlers that block.
            #[must_use]
            pub fn inline_within(self, limit: ::core::option::Option<::core::time::Duration>) -> Self {
                Self { inline_within: limit, ..self }
            }
        }

        impl<#implementor: #ident> ::tollway::rpc::Service for #server<#implementor> {
            fn name(&self) -> &str {
                #name
            }

            fn call(&self, #call: ::tollway::rpc::IncomingCall) -> ::tollway::rpc::BoxReply {
                match #call.method() {
                    #(#arms)*
                    _ => ::tollway::rpc::Reply::unknown_method().boxed(),
                }
            }

            fn inline_within(&self) -> ::core::option::Option<::core::time::Duration> {
                self.inline_within
            }

            fn schema(&self) -> ::core::option::Option<u64> {
                <#client as ::tollway::rpc::ServiceClient>::SCHEMA
            }

            fn method_name(&self, method: ::tollway::rpc::MethodId) -> ::core::option::Option<&'static str> {
                match method {
                    #(#names)*
                    _ => ::core::option::Option::None,
                }
            }
        }

        impl<#implementor: #ident> ::core::convert::From<::std::sync::Arc<#implementor>> for #server<#implementor> {
            fn from(service: ::std::sync::Arc<#implementor>) -> Self {
                Self { service, inline_within: ::tollway::__private::INLINE_WITHIN }
            }
        }

        impl<#implementor> ::core::clone::Clone for #server<#implementor> {
            fn clone(&self) -> Self {
                Self { service: ::std::sync::Arc::clone(&self.service), inline_within: self.inline_within }
            }
        }

        impl<#implementor> ::core::fmt::Debug for #server<#implementor> {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                f.debug_struct(::core::stringify!(#server)).finish_non_exhaustive()
            }
        }
    }
}

/// The arm that answers a method.
fn handler(service: &Service, method: &Method) -> TokenStream {
    let (of, name, implementor) = (&service.ident, &method.ident, own("T"));
    let [call, service, context, arguments, error, reply] =
        ["call", "service", "context", "arguments", "error", "reply"].map(own);
    let names: Vec<_> = method.arguments.iter().map(|(name, _)| name).collect();
    let types: Vec<_> = method.arguments.iter().map(|(_, of)| of).collect();
    let (takes_context, context_argument) = match &method.context {
        Some(_) => (quote!(#context), quote!(&#context,)),
        None => (quote!(_), quote!()),
    };
    let wait = method.is_async.then(|| quote!(.await));
    let called = quote!(<#implementor as #of>::#name(&#service, #context_argument #(#names),*)#wait);
    let decoded = |fail: TokenStream| {
        quote! {
            let (#takes_context, mut #arguments) = #call.into_parts();
            let (#(#names,)*) = match #arguments.decode::<(#(#types,)*)>() {
                ::core::result::Result::Ok(#arguments) => #arguments,
                ::core::result::Result::Err(#error) => return #fail(::tollway::rpc::Reply::invalid_payload(&#error)),
            };
        }
    };
    let value = own("value");
    // What becomes of a value that is returned, and of an error.
    let settled = |value_of: TokenStream, fail: TokenStream| match &method.error {
        None => quote!({ let #value = #called; #value_of }),
        Some(_) => quote! {
            match #called {
                ::core::result::Result::Ok(#value) => #value_of,
                ::core::result::Result::Err(#error) => #fail(::tollway::rpc::Reply::error(&#error)),
            }
        },
    };
    let answered = match &method.returns {
        Returns::Value(_) => {
            let (kept, cost) = priced(method, &value);
            let (decoded, settled) =
                (decoded(quote!()), settled(quote!(::tollway::rpc::Reply::ok(&#value)#cost), quote!()));
            quote!(async move { #decoded #kept #settled })
        }
        Returns::Stream(_) => {
            let fail = quote!(#reply.answer);
            let (decoded, settled) = (decoded(fail.clone()), settled(quote!(#reply.feed(#value).await), fail));
            quote!(::tollway::__private::streaming(move |#reply| async move { #decoded #settled }))
        }
    };
    quote! {{
        let #service = ::std::sync::Arc::clone(&self.service);
        ::std::boxed::Box::pin(#answered)
    }}
}

/// What is kept of the arguments for the function that says what a call has cost, and what it does to the reply.
fn priced(method: &Method, value: &Ident) -> (TokenStream, TokenStream) {
    let Some(with) = method.price.as_ref().and_then(Price::with) else { return Default::default() };
    let (names, types): (Vec<_>, Vec<_>) = method.arguments.iter().map(|(name, of)| (name, of)).unzip();
    let kept: Vec<_> = (0..names.len()).map(|index| own(&format!("kept_{index}"))).collect();
    let copies =
        types.iter().zip(&names).map(|(of, name)| quote_spanned!(of.span()=> ::core::clone::Clone::clone(&#name)));
    // A reference that is an argument is given as it is, a value by reference.
    let given = types.iter().zip(&kept).map(|(of, name)| match of {
        Type::Reference(_) => quote!(#name),
        _ => quote!(&#name),
    });
    let cost = quote_spanned!(with.span()=> ::core::convert::Into::into(#with(#(#given,)* &#value)));
    (quote!(#(let #kept = #copies;)*), quote!(.costing(#cost)))
}

fn price_list(service: &Service) -> TokenStream {
    let Service { name, version, .. } = service;
    let server = server_name(service);
    let prices = service.methods.iter().filter_map(|method| {
        let price = method.price.as_ref()?;
        let (conditions, name) = (method.conditions(), plain_name(method));
        let (value, [max_item, max_answer]) = (price.value(), price.sizes());
        Some(quote! {
            #(#conditions)*
            {
                const PRICE: ::tollway::protocol::payment::Price = #value;
                const SIZES: [u64; 2] = [#max_item, #max_answer];
                prices.push(::tollway::__private::method_price((Self::NAME, Self::VERSION, #name), PRICE, SIZES));
            }
        })
    });
    quote! {
        impl #server<()> {
            /// The service's name.
            pub const NAME: &'static str = #name;
            /// The service's version, which is part of its methods' ids.
            pub const VERSION: u32 = #version;

            /// The prices of its methods; one that is not in the list is free.
            pub fn prices() -> ::std::vec::Vec<::tollway::protocol::payment::MethodPrice> {
                #[allow(unused_mut)]
                let mut prices = ::std::vec::Vec::new();
                #(#prices)*
                prices
            }
        }
    }
}
